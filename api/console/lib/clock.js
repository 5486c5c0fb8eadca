// The passing of time, for "12 s ago" and running durations.

import { useEffect, useState } from './ui.js';

/** The time now, redrawing the calling component every second. */
export function useNow() {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, []);
  return now;
}

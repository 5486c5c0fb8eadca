// Which view is shown: the part of the address behind `#`, such as `#/vms/web-1?state=running`.

import { useLayoutEffect, useState } from './ui.js';

/** `{name, id, query}` of the address now. */
function route() {
  const [path, search = ''] = location.hash.replace(/^#\/?/, '').split('?');
  const [name, id] = path.split('/').map(decodeURIComponent);
  return { name: name || 'overview', id: id || null, query: new URLSearchParams(search) };
}

/** The address of a view. */
export function linkTo(name, id) {
  return id ? `#/${name}/${encodeURIComponent(id)}` : `#/${name}`;
}

/** Shows a view. */
export function go(name, id) {
  location.hash = linkTo(name, id);
}

/** The route, redrawing the calling component when it changes. */
export function useRoute() {
  const [now, setNow] = useState(route);
  useLayoutEffect(() => {
    const listener = () => setNow(route());
    window.addEventListener('hashchange', listener);
    return () => window.removeEventListener('hashchange', listener);
  }, []);
  return now;
}

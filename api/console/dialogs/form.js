// What the dialogs with a form have in common.

import { useEffect, useRef, useState } from '../lib/ui.js';
import { problemIn } from '../parts/problem.js';

/** `[busy, problem, run(act)]`: runs one request at a time and keeps what went wrong. */
export function useRequest() {
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState(null);
  const run = async (act) => {
    if (busy) return;
    setBusy(true);
    setProblem(null);
    try {
      await act();
    } catch (error) {
      setProblem(problemIn(error));
    } finally {
      setBusy(false);
    }
  };
  return [busy, problem, run];
}

/**
 * Asks the server whenever `key` changes and has stayed the same for a moment; `ask(signal)` answers.
 * Gives `{answer, problem, busy}`; an answer that came too late is dropped.
 */
export function useAnswer(key, ask, delayMs = 0) {
  const [state, setState] = useState({ busy: true });
  const latest = useRef(null);
  useEffect(() => {
    const request = new AbortController();
    latest.current = request;
    setState((before) => ({ ...before, busy: true }));
    const finish = (result) => latest.current === request && setState({ busy: false, ...result });
    const timer = setTimeout(() => {
      ask(request.signal).then((answer) => finish({ answer }), (error) => error.name !== 'AbortError' && finish({ problem: problemIn(error) }));
    }, delayMs);
    return () => {
      clearTimeout(timer);
      request.abort();
    };
  }, [key]);
  return state;
}

// The API token of this browser session, and the wait for the operator to give one.

const KEY = 'godwit.token';
const listeners = new Set();
let waiting = null;

/** The token given in this browser session, or null. */
export function token() {
  return sessionStorage.getItem(KEY);
}

/** Whether the console waits for a token: null, or `{rejected}` when one was given and refused. */
export function demand() {
  return waiting && { rejected: waiting.rejected };
}

/** Calls `listener` whenever `demand()` changes; returns how to stop. */
export function onDemand(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/**
 * Waits until the operator has given a token. `refused` is the token the server just answered 401 to; when
 * another request has had it replaced meanwhile, there is nothing to wait for.
 */
export function waitForToken(refused) {
  if (token() !== refused) return Promise.resolve();
  if (!waiting) {
    waiting = { rejected: refused !== null };
    waiting.promise = new Promise((resolve) => (waiting.resolve = resolve));
    listeners.forEach((listener) => listener());
  }
  return waiting.promise;
}

/** Keeps the token for this browser session and lets every waiting request go on. */
export function giveToken(value) {
  sessionStorage.setItem(KEY, value);
  const done = waiting;
  waiting = null;
  done?.resolve();
  listeners.forEach((listener) => listener());
}

// Server-sent events read with fetch: EventSource cannot send an Authorization header.

import { headers, problemOf, ProblemError, unreachable } from './api.js';
import { token, waitForToken } from './auth.js';

/** The server sends at least a comment this often; longer silence means a dead connection. */
const SILENCE_LIMIT_MS = 45_000;

/**
 * Reads the stream at `path` until it ends, fails or falls silent. Calls `onOpen()` once connected and
 * `onMessage({id, event, data})` for each message. Throws a ProblemError when the server refuses.
 */
export async function readStream(path, { lastId, onOpen, onMessage }) {
  const silence = new AbortController();
  const response = await open(path, lastId, silence.signal);
  onOpen();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let watchdog;
  const heard = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => silence.abort(), SILENCE_LIMIT_MS);
  };
  const parse = messageParser(onMessage);
  try {
    heard();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      parse(value);
    }
  } finally {
    clearTimeout(watchdog);
    reader.cancel().catch(() => {});
  }
}

async function open(path, lastId, signal) {
  for (;;) {
    const used = token();
    let response;
    try {
      response = await fetch(path, {
        headers: headers({
          Accept: 'text/event-stream',
          ...(lastId === null ? {} : { 'Last-Event-ID': String(lastId) }),
        }),
        cache: 'no-store',
        signal,
      });
    } catch (cause) {
      throw cause.name === 'AbortError' ? cause : new ProblemError(unreachable(cause));
    }
    if (response.status === 401) {
      await waitForToken(used);
      continue;
    }
    if (!response.ok) throw new ProblemError(await problemOf(response));
    return response;
  }
}

/** Cuts text into messages, as the HTML standard's "event stream interpretation" says. */
export function messageParser(onMessage) {
  let rest = '';
  let message = { id: undefined, event: 'message', data: [] };
  const line = (text) => {
    if (text === '') {
      if (message.data.length) onMessage({ ...message, data: message.data.join('\n') });
      message = { id: undefined, event: 'message', data: [] };
      return;
    }
    const colon = text.indexOf(':');
    if (colon === 0) return;
    const field = colon < 0 ? text : text.slice(0, colon);
    const value = colon < 0 ? '' : text.slice(colon + 1).replace(/^ /, '');
    if (field === 'data') message.data.push(value);
    else if (field === 'event') message.event = value;
    else if (field === 'id') message.id = value;
  };
  return (chunk) => {
    // A chunk may end between CR and LF: the CR is kept back until what follows it is known.
    const text = rest + chunk;
    const cut = text.endsWith('\r') ? text.length - 1 : text.length;
    const lines = text.slice(0, cut).split(/\r\n|\r|\n/);
    rest = lines.pop() + text.slice(cut);
    lines.forEach(line);
  };
}

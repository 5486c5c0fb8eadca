// The REST API: one function for a request, one error for every way it can fail.

import { token, waitForToken } from './auth.js';

const TIMEOUT_MS = 20_000;
const PAGE_LIMIT = 1000;
const MAX_PAGES = 100;

/** A request that did not succeed; `problem` has the RFC 9457 shape whatever the cause. */
export class ProblemError extends Error {
  constructor(problem) {
    super(problem.detail || problem.title);
    this.problem = problem;
  }
}

/** Headers every request carries. */
export function headers(extra = {}) {
  const held = token();
  return held ? { ...extra, Authorization: `Bearer ${held}` } : extra;
}

/** What to tell the operator when no answer came at all. */
export function unreachable(cause) {
  return {
    type: 'unreachable',
    title: 'The server does not answer',
    status: 0,
    detail: cause?.name === 'TimeoutError' ? `no answer within ${TIMEOUT_MS / 1000} s` : 'the connection failed',
    remedy: 'check that `godwit server` runs and that this browser can reach it',
  };
}

/** The problem in `response`, or one made up from its status when the body is something else. */
export async function problemOf(response) {
  try {
    const body = await response.json();
    if (body && typeof body.detail === 'string') return body;
  } catch {
    // Not JSON: a proxy's page, perhaps.
  }
  return {
    type: 'http-error',
    title: `HTTP ${response.status}`,
    status: response.status,
    detail: `${response.url} answered ${response.status} ${response.statusText}`,
  };
}

async function call(method, path, body, signal) {
  for (;;) {
    const used = token();
    let response;
    try {
      response = await fetch(path, {
        method,
        headers: headers({
          Accept: 'application/json',
          ...(body === undefined ? {} : { 'Content-Type': 'application/json' }),
        }),
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: signal ?? AbortSignal.timeout(TIMEOUT_MS),
      });
    } catch (cause) {
      if (cause.name === 'AbortError') throw cause;
      throw new ProblemError(unreachable(cause));
    }
    if (response.status === 401) {
      await waitForToken(used);
      continue;
    }
    if (!response.ok) throw new ProblemError(await problemOf(response));
    if (response.status === 204) return null;
    const text = await response.text();
    return text ? JSON.parse(text) : null;
  }
}

export const get = (path, signal) => call('GET', path, undefined, signal);
export const post = (path, body = {}, signal) => call('POST', path, body, signal);
export const patch = (path, body) => call('PATCH', path, body);
export const remove = (path) => call('DELETE', path);

/** Sends a file; it may take as long as it takes. */
export async function upload(path, file) {
  let response;
  try {
    response = await fetch(path, { method: 'PUT', headers: headers({ 'Content-Type': 'application/octet-stream' }), body: file });
  } catch (cause) {
    throw new ProblemError(unreachable(cause));
  }
  if (!response.ok) throw new ProblemError(await problemOf(response));
  return response.json();
}

/** Asks what `POST path` would do, without doing it. */
export const tryPost = (path, body = {}, signal) => call('POST', `${path}?dry_run=true`, body, signal);

/** Every item of a list, page by page, with the revision of the first page. */
export async function list(path) {
  const items = [];
  let revision = 0;
  let cursor = null;
  for (let page = 0; page < MAX_PAGES; page += 1) {
    const query = new URLSearchParams({ limit: PAGE_LIMIT, ...(cursor ? { cursor } : {}) });
    const answer = await get(`${path}?${query}`);
    if (page === 0) revision = answer.revision ?? 0;
    items.push(...answer.items);
    cursor = answer.next;
    if (!cursor) break;
  }
  return { items, revision };
}

// Keeps the store equal to the server: load everything, follow the stream, resume after an interruption.
//
//   connecting ──loaded──► live ──stream ends──► lost ──after backoff──► connecting
//
// The stream resumes at the last revision seen. Everything is loaded afresh when the server says that it no
// longer has that revision (410, or a `reset` message) and after an outage longer than FRESH_AFTER_MS.

import { get, list, ProblemError, unreachable } from './api.js';
import { readStream } from './stream.js';
import { addEvent, KINDS, removeItem, replaceAll, setConnection, store, upsert } from './store.js';

const BACKOFF_MS = [500, 1000, 2000, 4000, 8000];
const FRESH_AFTER_MS = 60_000;
const EVENTS_BACK = 5000;
const GAP_MESSAGES = ['reset', 'gap'];

const PATHS = {
  vm: '/v1/vms',
  host: '/v1/hosts',
  operation: '/v1/operations',
  maintenance: '/v1/maintenances',
  migration: '/v1/migrations',
  image: '/v1/images',
  disk: '/v1/disks',
  network: '/v1/networks',
  pool: '/v1/pools',
};

let wake = () => {};

/** Ends the wait for the next attempt. */
export function retryNow() {
  wake();
}

/** Runs for the life of the page. */
export async function follow() {
  let revision = null;
  let attempt = 0;
  let lostSince = null;
  for (;;) {
    let problem;
    try {
      if (revision === null) revision = await loadAll();
      await readStream(`/v1/events?after=${revision}`, {
        lastId: revision,
        onOpen() {
          attempt = 0;
          lostSince = null;
          setConnection({ state: 'live' });
        },
        onMessage(message) {
          if (GAP_MESSAGES.includes(message.event)) throw new Gap();
          const id = Number(message.id);
          if (message.id && Number.isFinite(id)) revision = id;
          apply(message.event, JSON.parse(message.data));
        },
      });
      problem = unreachable();
    } catch (error) {
      if (error instanceof Gap || error.problem?.status === 410) {
        revision = null;
        await pause(BACKOFF_MS[0]);
        continue;
      }
      if (!(error instanceof ProblemError)) console.warn('event stream:', error);
      problem = error.problem ?? unreachable(error);
    }
    lostSince ??= Date.now();
    if (Date.now() - lostSince > FRESH_AFTER_MS) revision = null;
    const wait = BACKOFF_MS[Math.min(attempt, BACKOFF_MS.length - 1)] * (0.8 + 0.4 * Math.random());
    attempt += 1;
    setConnection({ state: 'lost', since: lostSince, retryAt: Date.now() + wait, problem });
    await pause(wait);
  }
}

/** The stream no longer continues where we stopped. */
class Gap extends Error {}

async function loadAll() {
  const lists = {};
  let revision = Infinity;
  for (const kind of KINDS) {
    const answer = await list(PATHS[kind]);
    lists[kind] = answer.items;
    // The oldest revision of all lists: whatever changed while the others loaded comes again.
    revision = Math.min(revision, answer.revision);
  }
  replaceAll(lists, await latestEvents(revision));
  return revision;
}

async function latestEvents(revision) {
  const events = [];
  let after = Math.max(0, revision - EVENTS_BACK);
  for (let page = 0; page < 20; page += 1) {
    const answer = await get(`/v1/events?after=${after}&limit=1000`);
    events.push(...answer.items);
    const last = answer.items.at(-1);
    if (!last || !answer.next || last.revision <= after) break;
    after = last.revision;
  }
  return events;
}

function apply(event, data) {
  if (event === 'event') addEvent(data);
  else if (event === 'deleted') removeItem(data.kind, data.id);
  else if (KINDS.includes(event)) upsert(event, data);
}

function pause(ms) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}

window.addEventListener('online', retryNow);
document.addEventListener('visibilitychange', () => {
  if (!document.hidden && store.connection.state === 'lost') retryNow();
});

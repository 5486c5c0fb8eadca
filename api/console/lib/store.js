// Everything the console knows of the pool, and who wants to hear when it changes.

import { useLayoutEffect, useState } from './ui.js';

const MAX_EVENTS = 2000;
const MAX_SAMPLES = 300;
const SAMPLE_MS = 1000;
/** Views are redrawn at most this often, however fast the server sends. */
const REDRAW_MS = 100;

export const KINDS = ['vm', 'host', 'operation', 'maintenance', 'migration', 'image', 'disk', 'network', 'pool'];

const emptyMaps = () => Object.fromEntries(KINDS.map((kind) => [kind, new Map()]));

/** One object for the life of the page; views read it and never write it. */
export const store = {
  ...emptyMaps(),
  /** Newest first. */
  events: [],
  /** `vm` and `host` usage since the page opened: id → [{time, ...usage}]. */
  samples: new Map(),
  loaded: false,
  /** `connecting`, `live` or `lost` (then with `since`, `retryAt` and `problem`). */
  connection: { state: 'connecting' },
};

const listeners = new Set();
let redraw = null;

/** Tells the views, soon and once for many changes. */
function changed() {
  redraw ??= setTimeout(() => {
    redraw = null;
    listeners.forEach((listener) => listener());
  }, REDRAW_MS);
}

/** Replaces everything by freshly loaded lists: `{vm: [...], host: [...], ...}`. */
export function replaceAll(lists, events) {
  for (const kind of KINDS) {
    store[kind] = new Map(lists[kind].map((item) => [item.id, item]));
    lists[kind].forEach((item) => sample(kind, item));
  }
  store.events = events.slice(-MAX_EVENTS).reverse();
  store.loaded = true;
  changed();
}

export function upsert(kind, item) {
  store[kind].set(item.id, item);
  sample(kind, item);
  changed();
}

export function removeItem(kind, id) {
  store[kind]?.delete(id);
  store.samples.delete(id);
  changed();
}

export function addEvent(event) {
  const newest = store.events[0];
  if (newest && event.revision <= newest.revision && store.events.some((known) => sameEvent(known, event))) return;
  store.events = [event, ...store.events].slice(0, MAX_EVENTS);
  changed();
}

export function setConnection(connection) {
  store.connection = connection;
  changed();
}

/** Redraws the calling component whenever the store changes. */
export function useStore() {
  const [, redrawn] = useState(0);
  // At once, not after painting: a change in between would go unseen.
  useLayoutEffect(() => {
    const listener = () => redrawn((count) => count + 1);
    listeners.add(listener);
    return () => listeners.delete(listener);
  }, []);
  return store;
}

function sameEvent(a, b) {
  return a.revision === b.revision && a.kind === b.kind && a.message === b.message;
}

function sample(kind, item) {
  if (!item.usage || (kind !== 'vm' && kind !== 'host')) return;
  const samples = store.samples.get(item.id) ?? [];
  const time = Date.now();
  if (samples.length && time - samples[samples.length - 1].time < SAMPLE_MS * 0.8) return;
  samples.push({ time, ...item.usage });
  if (samples.length > MAX_SAMPLES) samples.shift();
  store.samples.set(item.id, samples);
}

// A state as a word with a coloured sign in front.

import { html } from '../lib/ui.js';
import { words } from '../lib/format.js';
import { toneOf } from '../lib/tone.js';

/** The state of a `vm`, `host`, `operation`, `maintenance`, `severity`, `step`, `move`, `image` or `disk`. */
export function State({ kind, state, reason, testid }) {
  const tone = toneOf(kind, state);
  return html`<span class="state state-${tone}" data-state=${state} data-testid=${testid} title=${reason || null}>
    <span class="dot" aria-hidden="true"></span>${words(state)}
  </span>`;
}

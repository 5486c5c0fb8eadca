// What stands where there is nothing to show yet.

import { html } from '../lib/ui.js';

/** Nothing there, why, and what to do about it. */
export function Empty({ title, children }) {
  return html`<div class="empty" data-testid="empty"><strong>${title}</strong>${children && html`<p>${children}</p>`}</div>`;
}

/** Grey lines while the first answer is awaited. */
export function Loading() {
  return html`<div class="loading" role="status" aria-label="Loading" data-testid="loading"><span></span><span></span><span></span></div>`;
}

// Bars: how much of something is used, and how far something has come.

import { classes, html } from '../lib/ui.js';

const clamp = (share) => Math.max(0, Math.min(1, Number.isFinite(share) ? share : 0));

/** A labelled usage bar; from `warnAt` on it changes colour. */
export function Meter({ label, share, text, warnAt = 0.85, badAt = 0.95, title }) {
  const value = clamp(share);
  const level = share >= badAt ? 'bad' : share >= warnAt ? 'warn' : 'ok';
  return html`<div class="meter" title=${title}>
    <span class="meter-label">${label}</span>
    <span class="track" role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax="100" aria-valuenow=${Math.round(value * 100)}
      aria-valuetext=${text}>
      <span class="fill fill-${level}" style=${{ width: `${value * 100}%` }}></span>
    </span>
    <span class="meter-text">${text}</span>
  </div>`;
}

/** A small bar with its number, for table cells. */
export function CellBar({ share, text, label }) {
  return html`<span class="cell-bar">
    <span class="cell-bar-text">${text}</span>
    <span class="track" role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax="100" aria-valuenow=${Math.round(clamp(share) * 100)}>
      <span class="fill fill-ok" style=${{ width: `${clamp(share) * 100}%` }}></span>
    </span>
  </span>`;
}

/** How far something has come. */
export function Progress({ share, label, tone = 'busy', thin }) {
  const value = clamp(share);
  return html`<span class=${classes('track', 'progress', thin && 'progress-thin')} role="progressbar" aria-label=${label} aria-valuemin="0"
    aria-valuemax="100" aria-valuenow=${Math.round(value * 100)}>
    <span class="fill fill-${tone}" style=${{ width: `${value * 100}%` }}></span>
  </span>`;
}

// A small curve of the last minutes.

import { html } from '../lib/ui.js';

const WIDTH = 240;
const HEIGHT = 44;
/** The curve begins with the page; its scale grows from the least to the longest span. */
const LEAST_SPAN_MS = 60_000;
const SPAN_MS = 5 * 60_000;

/** `samples`: [{time, …}]; `value(sample)` picks the number, `max` is the least top of the scale. */
export function Sparkline({ label, text, samples = [], value, max = 0 }) {
  const end = samples.at(-1)?.time ?? 0;
  const recent = samples.filter((sample) => sample.time > end - SPAN_MS);
  const span = Math.max(LEAST_SPAN_MS, end - (recent[0]?.time ?? end));
  const top = Math.max(max, ...recent.map(value), 1e-9) * 1.08;
  const x = (sample) => (WIDTH * (sample.time - (end - span))) / span;
  const y = (sample) => HEIGHT - 1 - ((HEIGHT - 2) * value(sample)) / top;
  const line = recent.map((sample) => `${x(sample).toFixed(1)},${y(sample).toFixed(1)}`).join(' ');
  return html`<figure class="sparkline">
    <figcaption><span>${label}</span><strong>${text}</strong></figcaption>
    <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label="${label}, last minutes, now ${text}">
      <line class="sparkline-base" x1="0" x2=${WIDTH} y1=${HEIGHT - 0.5} y2=${HEIGHT - 0.5} />
      ${recent.length > 1 && html`<polygon class="sparkline-area" points="${x(recent[0]).toFixed(1)},${HEIGHT} ${line} ${WIDTH},${HEIGHT}" />
        <polyline class="sparkline-line" points=${line} />`}
    </svg>
  </figure>`;
}

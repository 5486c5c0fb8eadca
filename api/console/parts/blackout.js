// Where the time of a finished migration went: its phases, and what the blackout consisted of.

import { html } from '../lib/ui.js';
import { milliseconds } from '../lib/format.js';

/** Length of a bar; its parts are in proportion. */
const WIDTH = 1000;
const HEIGHT = 10;
/** A part that took any time at all can be seen. */
const LEAST_WIDTH = 4;

/** Whether a migration tells enough to draw it. */
export function hasTimeline(migration) {
  return Boolean(migration.progress?.blackout && migration.progress.elapsed_ms);
}

/** Two bars: the whole migration, and its blackout enlarged. */
export function MigrationTimeline({ migration }) {
  const p = migration.progress;
  const parts = blackoutParts(p.blackout);
  const blackout = p.downtime_us ?? parts.reduce((sum, part) => sum + part.us, 0);
  const predicted = p.blackout.predicted_us;
  return html`<div class="timeline" data-testid="timeline-${migration.vm_name}">
    <${Bar} label="Migration" total=${p.elapsed_ms * 1000} parts=${phases(p, blackout)} />
    <${Bar} label="Blackout" total=${blackout} parts=${parts} note=${predicted ? `predicted ${milliseconds(predicted / 1000)}` : ''} />
  </div>`;
}

function phases(progress, blackout) {
  const elapsed = progress.elapsed_ms * 1000;
  const prefault = Math.min((progress.prefault_ms ?? 0) * 1000, elapsed);
  return [
    { key: 'prefault', name: 'Take memory', us: prefault },
    { key: 'copy', name: 'Copy', us: Math.max(0, elapsed - prefault - blackout) },
    { key: 'blackout', name: 'Blackout', us: Math.min(blackout, elapsed) },
  ];
}

function blackoutParts(blackout) {
  return [
    { key: 'pause', name: 'Pause', us: blackout.pause_us },
    { key: 'save', name: 'Save', us: blackout.save_us },
    { key: 'pages', name: 'Last pages', us: blackout.pages_us },
    { key: 'restore', name: 'Restore', us: blackout.restore_us },
    { key: 'commit', name: 'Commit', us: blackout.commit_us },
  ];
}

function Bar({ label, total, parts, note }) {
  const told = parts.map((part) => `${part.name} ${milliseconds(part.us / 1000)}`).join(', ');
  return html`<figure class="timeline-bar">
    <figcaption><span>${label}</span><strong>${milliseconds(total / 1000)}</strong>${note && html`<span class="quiet">${note}</span>`}</figcaption>
    <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label="${label}: ${told}">
      ${placed(parts).map((part) => html`<rect key=${part.key} class="timeline-part is-${part.key}" x=${part.x.toFixed(1)} y="0"
        width=${part.width.toFixed(1)} height=${HEIGHT}><title>${part.name}: ${milliseconds(part.us / 1000)}</title></rect>`)}
    </svg>
    <ul class="timeline-legend">${parts.map((part) => html`<li key=${part.key}>
      <svg class="timeline-swatch" viewBox="0 0 10 10" aria-hidden="true"><rect class="timeline-part is-${part.key}" width="10" height="10" /></svg>
      ${part.name} <b>${milliseconds(part.us / 1000)}</b></li>`)}</ul>
  </figure>`;
}

/** Side by side over the whole width, each in proportion but never too thin to see. */
export function placed(parts) {
  const sum = parts.reduce((total, part) => total + part.us, 0);
  const wide = parts.map((part) => (part.us > 0 ? Math.max(LEAST_WIDTH, (WIDTH * part.us) / sum) : 0));
  const scale = WIDTH / Math.max(1, wide.reduce((total, width) => total + width, 0));
  let x = 0;
  return parts.map((part, index) => {
    const width = wide[index] * scale;
    const at = { ...part, x, width };
    x += width;
    return at;
  });
}

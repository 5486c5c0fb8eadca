// Where the time of a finished migration went: its phases, what the blackout consisted of, and which pages it sent.

import { html } from '../lib/ui.js';
import { bytes, milliseconds, percent } from '../lib/format.js';

/** Length of a bar; its parts are in proportion. */
const WIDTH = 1000;
const HEIGHT = 10;
/** A part that took any time at all can be seen. */
const LEAST_WIDTH = 4;
const PAGE_BYTES = 4096;

/** Whether a migration tells enough to draw it. */
export function hasTimeline(migration) {
  return Boolean(migration.progress?.blackout && migration.progress.elapsed_ms);
}

/** Three bars: the whole migration, its blackout enlarged, and its pages by kind; below them what the guest paid. */
export function MigrationTimeline({ migration }) {
  const p = migration.progress;
  const parts = blackoutParts(p.blackout);
  const blackout = p.downtime_us ?? parts.reduce((sum, part) => sum + part.size, 0);
  const predicted = p.blackout.predicted_us;
  const gap = p.packet_gap_us;
  const foreseen = migration.foreseen;
  const pages = pageParts(p);
  const sum = pages.reduce((total, part) => total + part.size, 0);
  return html`<div class="timeline" data-testid="timeline-${migration.vm_name}" data-migration=${migration.id}>
    <${Bar} label="Migration" total=${duration(p.elapsed_ms * 1000)} parts=${phases(p, blackout)} told=${duration}
      note=${foreseen ? `foreseen ${milliseconds(foreseen.took_ms)}` : ''} />
    <${Bar} label="Blackout" total=${duration(blackout)} parts=${parts} told=${duration}
      note=${[predicted && `predicted ${duration(predicted)}`, gap && `network silent for ${duration(gap)}`, foreseen && `foreseen ${milliseconds(foreseen.blackout_ms)}`].filter(Boolean).join(', ')} />
    ${sum > 0 && html`<${Bar} label="Memory" total=${inPages(sum)} parts=${pages} told=${inPages} note=${`in ${p.round} rounds`} />`}
    ${pain(p).map((line) => html`<p class="quiet" key=${line}>${line}</p>`)}
  </div>`;
}

const duration = (us) => milliseconds(us / 1000);
const inPages = (pages) => bytes(pages * PAGE_BYTES);

function phases(progress, blackout) {
  const elapsed = progress.elapsed_ms * 1000;
  const prefault = Math.min((progress.prefault_ms ?? 0) * 1000, elapsed);
  const follow = Math.min((progress.post_copy?.took_ms ?? 0) * 1000, elapsed);
  return [
    { key: 'prefault', name: 'Take memory', size: prefault },
    { key: 'copy', name: 'Copy', size: Math.max(0, elapsed - prefault - blackout - follow) },
    { key: 'blackout', name: 'Blackout', size: Math.min(blackout, elapsed) },
    progress.post_copy && { key: 'follow', name: 'Memory follows', size: follow },
  ].filter(Boolean);
}

function blackoutParts(blackout) {
  return [
    { key: 'pause', name: 'Pause', size: blackout.pause_us },
    { key: 'save', name: 'Save', size: blackout.save_us },
    { key: 'pages', name: 'Last pages', size: blackout.pages_us },
    { key: 'restore', name: 'Restore', size: blackout.restore_us },
    { key: 'commit', name: 'Commit', size: blackout.commit_us },
  ];
}

function pageParts(progress) {
  return [
    { key: 'content', name: 'Sent', size: progress.content_pages ?? 0 },
    { key: 'zero', name: 'All zero', size: progress.zero_pages ?? 0 },
    { key: 'kept', name: 'Kept at the target', size: progress.kept_pages ?? 0 },
  ];
}

/** What the guest paid for it, in sentences. */
function pain(progress) {
  const memory = progress.post_copy;
  const stalls = (progress.stalled_us ?? []).map((us, vcpu) => us > 0 && `vCPU ${vcpu} ${duration(us)}`).filter(Boolean);
  return [
    stalls.length > 0 && `Slowed down by up to ${percent(progress.throttle_percent)} so that the copy caught up; stood still for it: ${stalls.join(', ')}.`,
    memory && `${bytes(memory.owed_bytes)} followed the guest; it waited for ${memory.wanted_pages} pages${memory.waited_us > 0
      ? `, ${duration(memory.waited_us)} in all and ${duration(memory.longest_wait_us)} at most` : ''}; the link broke ${memory.interruptions} times.`,
  ].filter(Boolean);
}

function Bar({ label, total, parts, told, note }) {
  const all = parts.map((part) => `${part.name} ${told(part.size)}`).join(', ');
  return html`<figure class="timeline-bar">
    <figcaption><span>${label}</span><strong>${total}</strong>${note && html`<span class="quiet">${note}</span>`}</figcaption>
    <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img" aria-label="${label}: ${all}">
      ${placed(parts).map((part) => html`<rect key=${part.key} class="timeline-part is-${part.key}" x=${part.x.toFixed(1)} y="0"
        width=${part.width.toFixed(1)} height=${HEIGHT}><title>${part.name}: ${told(part.size)}</title></rect>`)}
    </svg>
    <ul class="timeline-legend">${parts.map((part) => html`<li key=${part.key}>
      <svg class="timeline-swatch" viewBox="0 0 10 10" aria-hidden="true"><rect class="timeline-part is-${part.key}" width="10" height="10" /></svg>
      ${part.name} <b>${told(part.size)}</b></li>`)}</ul>
  </figure>`;
}

/** Side by side over the whole width, each in proportion but never too thin to see. */
export function placed(parts) {
  const sum = parts.reduce((total, part) => total + part.size, 0);
  const wide = parts.map((part) => (part.size > 0 ? Math.max(LEAST_WIDTH, (WIDTH * part.size) / sum) : 0));
  const scale = WIDTH / Math.max(1, wide.reduce((total, width) => total + width, 0));
  let x = 0;
  return parts.map((part, index) => {
    const width = wide[index] * scale;
    const at = { ...part, x, width };
    x += width;
    return at;
  });
}

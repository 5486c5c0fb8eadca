// A live migration as it happens, and what is left of it afterwards.

import { classes, html, useState } from '../lib/ui.js';
import { ago, between, bytes, capital, inMib, milliseconds, percent, rate, sentence, time } from '../lib/format.js';
import { isMoving, memoryFollows } from '../lib/pool.js';
import { linkTo } from '../lib/router.js';
import { phaseWords, PHASE_ORDER } from '../lib/tone.js';
import { useNow } from '../lib/clock.js';
import { hasTimeline, MigrationTimeline } from './blackout.js';
import { Progress } from './meter.js';

/** How much of the guest's memory the target holds, 0 to 1. */
export function migrationShare(migration) {
  const { memory_bytes: memory, remaining_bytes: remaining } = migration.progress ?? {};
  const phase = PHASE_ORDER.indexOf(migration.phase);
  if (memoryFollows(migration)) {
    const { owed_bytes: owed, missing_bytes: missing } = migration.progress?.post_copy ?? {};
    return owed ? 1 - missing / owed : 1;
  }
  if (phase >= PHASE_ORDER.indexOf('awaiting_commit')) return 1;
  return memory ? Math.max(0, 1 - remaining / memory) : 0;
}

/** The panel of a migration under way: from → to, phase, figures. `onCancel` adds the button. */
export function LiveMigration({ migration, onCancel, heading = true }) {
  const p = migration.progress ?? {};
  const share = migrationShare(migration);
  // Until the hosts have shaken hands there is nothing to tell.
  const begun = p.memory_bytes > 0;
  const told = (value) => (begun ? value : null);
  const follows = memoryFollows(migration);
  const memory = follows && p.post_copy;
  const figures = [
    ...(memory ? postCopyFigures(memory) : []),
    ...(p.disk_bytes > 0 ? diskFigures(p) : []),
    ['Round', told(p.round) ?? '–'],
    ['Sent', begun ? `${inMib(p.transferred_bytes)} MiB` : '–'],
    ['Rate', rate(told(p.rate_bytes_per_s))],
    ['Remaining', begun ? `${inMib(p.remaining_bytes)} MiB` : '–'],
    ['Dirty rate', rate(told(p.dirty_bytes_per_s))],
    ['Predicted blackout', milliseconds(told(p.predicted_blackout_ms))],
    ['Lanes', !told(p.lanes) ? '–' : p.opened_lanes > p.lanes ? `${p.lanes} of ${p.opened_lanes}` : p.lanes],
    p.throttle_percent > 0 && ['Guest slowed by', percent(p.throttle_percent)],
    p.stalled_us?.length > 0 && ['Longest vCPU stall', milliseconds(Math.max(...p.stalled_us) / 1000)],
    p.kept_pages > 0 && ['Kept at the target', `${inMib(p.kept_pages * 4096)} MiB`],
    p.saved_bytes > 0 && ['Compression saved', bytes(p.saved_bytes)],
    p.prefault_ms > 0 && ['Prefault', milliseconds(p.prefault_ms)],
  ].filter(Boolean);
  return html`<section class="migration" data-testid="migration-${migration.vm_name}" data-phase=${migration.phase}
    aria-label="Migration of ${migration.vm_name}">
    <div class="migration-head">
      ${heading && html`<a class="migration-vm" href=${linkTo('vms', migration.vm_name)}>${migration.vm_name}</a>`}
      <span class="migration-phase">${phaseWords(migration.phase)}${migration.phase === 'pre_copy' && p.round
        ? html`, round <b>${p.round}</b>` : ''}</span>
      <span class="quiet">${begun ? milliseconds(p.elapsed_ms) : ''}</span>
      ${onCancel && html`<button type="button" class="button button-small" data-testid="migration-cancel" onClick=${onCancel}>${follows
        ? 'Give up its memory and start anew' : 'Cancel'}</button>`}
    </div>
    <div class="crossing">
      <span class="crossing-host">${migration.source_name}</span>
      <span class="crossing-way">
        <${Progress} share=${share} label="Memory held by ${migration.target_name}" />
        <span class="crossing-bead" style=${{ left: `${share * 100}%` }} aria-hidden="true"></span>
      </span>
      <span class="crossing-host">${migration.target_name}</span>
    </div>
    ${follows && html`<p class="note note-warn" data-testid="memory-follows">The guest runs on ${migration.target_name} ahead of its memory.
      Until the rest has followed, the loss of either host loses the running guest: do not power off ${migration.source_name}.</p>`}
    <dl class="figures">${figures.map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl>
  </section>`;
}

const postCopyFigures = (memory) => [
  ['Still at the source', `${inMib(memory.missing_bytes)} of ${inMib(memory.owed_bytes)} MiB`],
  ['Waited for', `${memory.wanted_pages} pages`],
  memory.waited_us > 0 && ['Longest wait', milliseconds(memory.longest_wait_us / 1000)],
  memory.interruptions > 0 && ['Link broke', `${memory.interruptions} times`],
].filter(Boolean);

const diskFigures = (progress) => [
  ['Disks', bytes(progress.disk_bytes)],
  ['Disks sent', bytes(progress.disk_transferred_bytes)],
  ['Disks remaining', bytes(progress.disk_remaining_bytes)],
];

/** One line on a migration that has ended. */
export function EndedMigration({ migration }) {
  const now = useNow();
  const done = migration.state === 'committed';
  const calledOff = migration.phase === 'cancelled';
  return html`<p class=${classes('migration-ended', !done && (calledOff ? 'is-idle' : 'is-failed'))} data-testid="migration-ended-${migration.vm_name}">
    ${done ? movedSentence(migration, now) : stayedSentence(migration, now)}
  </p>`;
}

function movedSentence(migration, now) {
  const p = migration.progress ?? {};
  const took = between(migration.started_at, migration.ended_at);
  return html`Moved from ${migration.source_name} to ${migration.target_name} ${ago(migration.ended_at, now)}:
    ${' '}${took}, ${inMib(p.transferred_bytes)} MiB, <strong>downtime ${downtime(p)}</strong>`;
}

function stayedSentence(migration, now) {
  const how = migration.phase === 'cancelled' ? 'was called off' : 'failed';
  return html`The move to ${migration.target_name} ${how} ${ago(migration.ended_at, now)}; the guest runs on at ${migration.source_name}.
    ${migration.reason && html`${' '}<span class="quiet">${capital(migration.reason)}</span>`}`;
}

const downtime = (progress) => milliseconds(progress.downtime_us === undefined || progress.downtime_us === null ? null : progress.downtime_us / 1000);

/** Table of a VM's migrations, newest first; one that tells its parts opens to be drawn, and the latest of them is open. */
export function MigrationHistory({ migrations }) {
  if (migrations.length === 0) return html`<p class="quiet">It has not moved yet.</p>`;
  const latest = migrations.find(hasTimeline);
  return html`<div class="scroll"><table class="table table-compact">
    <thead><tr><th scope="col">When</th><th scope="col">Way</th><th scope="col">Outcome</th><th scope="col" class="number">Rounds</th>
      <th scope="col" class="number">Sent</th><th scope="col" class="number">Took</th><th scope="col" class="number">Downtime</th></tr>
      </thead>
    <tbody>${migrations.map((migration) => html`<${PastMigration} key=${migration.id} migration=${migration}
      open=${migration === latest} />`)}</tbody>
  </table></div>`;
}

function PastMigration({ migration: m, open: openAtFirst }) {
  // Until the operator says otherwise, the latest one is open, also when another becomes the latest.
  const [chosen, setChosen] = useState(null);
  const open = (chosen ?? openAtFirst) && hasTimeline(m);
  const when = time(m.started_at);
  const outcome = isMoving(m) ? phaseWords(m.phase) : m.state === 'committed' ? 'Moved' : (m.reason ? capital(m.reason) : sentence(m.phase));
  return html`<tr>
    <td class="number-left">${hasTimeline(m) ? html`<button type="button" class="disclose" aria-expanded=${String(open)}
      aria-label="Timeline of the migration at ${when}" data-testid="timeline-open" onClick=${() => setChosen(!open)}>
      <span class="disclose-sign" aria-hidden="true">›</span>${when}</button>` : when}</td>
    <td>${m.source_name} → ${m.target_name}</td>
    <td title=${m.reason}>${outcome}</td>
    <td class="number">${m.progress?.round ?? '–'}</td>
    <td class="number">${bytes(m.progress?.transferred_bytes)}</td>
    <td class="number">${between(m.started_at, m.ended_at)}</td>
    <td class="number">${downtime(m.progress ?? {})}</td>
  </tr>
  ${open && html`<tr class="timeline-row"><td colspan="7"><${MigrationTimeline} migration=${m} /></td></tr>`}`;
}

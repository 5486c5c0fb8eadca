// A host: its state, what of it is used, and the VMs on it.

import { classes, html } from '../lib/ui.js';
import { ago, bytes, count, mib, percent } from '../lib/format.js';
import { guestsOf, maintenanceOf, migrationOf } from '../lib/pool.js';
import { hostIntents, maintain } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { useNow } from '../lib/clock.js';
import { Actions } from './actions.js';
import { ComingChip, VmChip } from './chip.js';
import { Meter } from './meter.js';
import { State } from './state.js';

const PRESSURE_WARN_PERCENT = 5;
const PRESSURE_BAD_PERCENT = 20;
const CHIPS_SHOWN = 36;

/** The usage bars of a host. */
export function HostMeters({ host }) {
  const { capacity, committed, usage = {}, facts } = host;
  const memory = facts?.memory_mib ?? 0;
  const used = (usage.memory_used_bytes ?? 0) / 2 ** 20;
  return html`<div class="meters">
    <${Meter} label="CPU" title="Busy share of all cores" warnAt=${0.95} badAt=${Infinity} share=${(usage.cpu_percent ?? 0) / 100}
      text="${percent(usage.cpu_percent)} of ${count(capacity.cores, 'core')}" />
    <${Meter} label="Memory" title="Memory in use on the host, by guests and everything else" share=${used / memory}
      text="${bytes(usage.memory_used_bytes)} of ${mib(memory)}" />
    <${Meter} label="Committed" title="Memory promised to VMs, of what the host gives to guests"
      share=${committed.memory_mib / capacity.guest_memory_mib} warnAt=${0.9} badAt=${1.001}
      text="${mib(committed.memory_mib)} of ${mib(capacity.guest_memory_mib)}" />
  </div>`;
}

/** Stalls on CPU, memory and I/O in the last ten seconds. */
export function Pressure({ pressure = {} }) {
  const entries = [['CPU', pressure.cpu_percent], ['memory', pressure.memory_percent], ['I/O', pressure.io_percent]];
  return html`<span class="pressure" title="Share of the last ten seconds in which some task waited">
    <span class="pressure-label">Pressure</span>
    ${entries.map(([label, value = 0]) => html`<span key=${label} class="pressure-item ${pressureTone(label, value)}">
      ${label} <b>${Math.round(value)}</b> %
    </span>`)}
  </span>`;
}

// Waiting for a CPU slows guests down; waiting for memory or I/O stalls them.
function pressureTone(label, value) {
  if (value < PRESSURE_WARN_PERCENT) return '';
  return value >= PRESSURE_BAD_PERCENT && label !== 'CPU' ? 'is-bad' : 'is-warn';
}

/** The card on the overview and hosts pages. */
export function HostCard({ pool, host, compact }) {
  const now = useNow();
  const { here, coming } = guestsOf(pool, host);
  const maintenance = maintenanceOf(pool, host);
  const shown = chipsOf(pool, here);
  const silent = host.state === 'unreachable';
  return html`<article class=${classes('host-card', `host-${host.state}`)} data-testid="host-${host.name}" data-state=${host.state}
    aria-label="Host ${host.name}">
    <header class="host-head">
      <${compact ? 'h3' : 'h2'} class="host-name"><a href=${linkTo('hosts', host.name)}>${host.name}</a><//>
      <${State} kind="host" state=${host.state} reason=${host.reason} testid="host-state-${host.name}" />
      ${maintenance && html`<a class="tag" href=${linkTo('maintenance', maintenance.id)}
        title="Maintenance: ${maintenance.state}">${maintenance.state}</a>`}
      <span class="host-count">${count(here.length, 'VM')}</span>
    </header>
    ${silent && html`<p class="host-silent">${host.reason ?? `Last heard ${host.last_seen ? ago(host.last_seen, now) : 'never'}`}</p>`}
    <div class=${classes(silent && 'is-stale')}><${HostMeters} host=${host} /></div>
    <div class="chips" aria-label="VMs on ${host.name}">
      ${shown.map(({ vm, leaving }) => html`<${VmChip} key=${vm.id} vm=${vm} leaving=${leaving} />`)}
      ${here.length > shown.length && html`<a class="chip chip-more" href=${linkTo('hosts', host.name)}>${here.length - shown.length} more</a>`}
      ${coming.map((migration) => html`<${ComingChip} key=${migration.id} migration=${migration} />`)}
      ${here.length + coming.length === 0 && html`<span class="quiet">No VMs here</span>`}
    </div>
    ${!compact && html`<footer class="host-foot">
      <${Pressure} pressure=${host.usage?.pressure} />
      <span class="actions">
        ${canBeMaintained(host) && html`<button type="button" class="button button-small" data-testid="maintenance-open"
          aria-label="Maintenance of ${host.name}" onClick=${() => maintain(host)}>Maintenance…</button>`}
        ${maintenance && html`<a class="button button-small" href=${linkTo('maintenance', maintenance.id)}>Open maintenance</a>`}
        <${Actions} intents=${hostIntents(host)} name=${host.name} small />
      </span>
    </footer>`}
  </article>`;
}

/** The VMs to show on a card: those that move in any case, the others as far as there is room. */
function chipsOf(pool, here) {
  const all = here.map((vm) => ({ vm, leaving: migrationOf(pool, vm) }));
  if (all.length <= CHIPS_SHOWN) return all;
  const moving = all.filter((chip) => chip.leaving);
  return [...moving, ...all.filter((chip) => !chip.leaving).slice(0, CHIPS_SHOWN - moving.length)];
}

export const canBeMaintained = (host) => (host.state === 'up' || host.state === 'cordoned') && !host.maintenance;

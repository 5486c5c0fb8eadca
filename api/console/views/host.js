// One host.

import { html } from '../lib/ui.js';
import { ago, mib, percent, rate, time } from '../lib/format.js';
import { find, guestsOf, maintenances, migrationOf } from '../lib/pool.js';
import { hostIntents, maintain, upgrade } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { useNow } from '../lib/clock.js';
import { Actions } from '../parts/actions.js';
import { ComingChip, VmChip } from '../parts/chip.js';
import { EventLines } from '../parts/event-list.js';
import { canBeMaintained, HostMeters, Pressure } from '../parts/host-card.js';
import { Empty } from '../parts/placeholder.js';
import { Sparkline } from '../parts/sparkline.js';
import { State } from '../parts/state.js';
import { PageHead } from './page.js';

const EVENTS_SHOWN = 30;

/** An agent that answers can be asked to change the VMMs of what runs there. */
const canBeUpgraded = (host, here) => ['up', 'cordoned'].includes(host.state) && here.length > 0;

/** What migrations may send from and to it. */
function bandwidth(host) {
  const links = (host.links ?? []).map((link) => `${rate(link.bytes_per_s)} to and from ${link.host_name}`);
  const whole = host.migration_bandwidth_bytes_per_s && `${rate(host.migration_bandwidth_bytes_per_s)} each way`;
  return [whole, ...links].filter(Boolean).join(', ') || 'all there is';
}

export function HostView({ pool, id }) {
  const now = useNow();
  const host = find(pool, 'host', id);
  const crumb = { href: '#/hosts', text: 'Hosts' };
  if (!host) return html`<${PageHead} title=${id} crumb=${crumb} />
    <${Empty} title="There is no host ${id}">It may have been removed from the pool.<//>`;
  const { here, coming } = guestsOf(pool, host);
  const events = pool.events.filter((event) => event.subject.id === host.id).slice(0, EVENTS_SHOWN);
  const past = maintenances(pool).filter((maintenance) => maintenance.host === host.id);
  const samples = pool.samples.get(host.id);
  const facts = [
    ['Address', host.address], ['CPU', host.facts?.cpu?.model], ['CPU level', host.facts?.cpu?.level], ['Cores', host.capacity.cores],
    ['Memory', mib(host.facts?.memory_mib)], ['For guests', mib(host.capacity.guest_memory_mib)], ['vCPUs given out', host.committed.vcpus],
    ['Migrations may use', bandwidth(host)], ['Kernel', host.facts?.kernel], ['Godwit', host.version], ['Last heard', host.last_seen ? ago(host.last_seen, now) : 'never'], ['Id', host.id],
  ];
  return html`<${PageHead} title=${host.name} crumb=${crumb} note=${html`<${State} kind="host" state=${host.state} reason=${host.reason}
    testid="host-state" />`}>
      ${canBeMaintained(host) && html`<button type="button" class="button" data-testid="maintenance-open"
        onClick=${() => maintain(host)}>Maintenance…</button>`}
      ${canBeUpgraded(host, here) && html`<button type="button" class="button" data-testid="upgrade-open"
        onClick=${() => upgrade(host)}>Upgrade VMs…</button>`}
      ${host.maintenance && html`<a class="button" href=${linkTo('maintenance', host.maintenance)}>Open maintenance</a>`}
      <${Actions} intents=${hostIntents(host)} name=${host.name} />
    <//>
    ${host.reason && html`<div class="note note-warn"><p>${host.reason}</p></div>`}
    <div class="detail">
      <div class="detail-main">
        <section class="panel"><header class="panel-head"><h2>Use</h2><${Pressure} pressure=${host.usage?.pressure} /></header>
          <${HostMeters} host=${host} />
          <div class="sparklines">
            <${Sparkline} label="CPU" text=${percent(host.usage?.cpu_percent)} samples=${samples} value=${(sample) => sample.cpu_percent} max=${10} />
            <${Sparkline} label="Memory used" text=${mib(Math.round((host.usage?.memory_used_bytes ?? 0) / 2 ** 20))} samples=${samples}
              value=${(sample) => sample.memory_used_bytes} max=${(host.facts?.memory_mib ?? 0) * 2 ** 20} />
          </div>
        </section>
        <section class="panel"><header class="panel-head"><h2>VMs</h2><span class="quiet">${here.length}</span></header>
          <div class="chips">${here.map((vm) => html`<${VmChip} key=${vm.id} vm=${vm}
            leaving=${migrationOf(pool, vm)} />`)}${coming.map((migration) => html`<${ComingChip} key=${migration.id}
            migration=${migration} />`)}${here.length + coming.length === 0 && html`<span class="quiet">No VMs here</span>`}</div>
        </section>
        <section class="panel"><header class="panel-head"><h2>Events</h2></header>
          <${EventLines} events=${events} empty="No events about this host." /></section>
      </div>
      <div class="detail-side">
        <section class="panel"><header class="panel-head"><h2>Facts</h2></header>
          <dl class="facts">${facts.map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value || '–'}</dd></div>`)}</dl>
          </section>
        <section class="panel"><header class="panel-head"><h2>Maintenances</h2>
          </header>${past.length === 0 ? html`<p class="quiet">None yet.</p>` : html`<ul class="plain">${past.map((maintenance) => html`<li
            key=${maintenance.id}>
          <a href=${linkTo('maintenance', maintenance.id)}>${maintenance.reason || 'Maintenance'}</a> <${State} kind="maintenance"
            state=${maintenance.state} />
          <span class="quiet"> ${time(maintenance.created_at)}</span></li>`)}</ul>`}</section>
      </div>
    </div>`;
}

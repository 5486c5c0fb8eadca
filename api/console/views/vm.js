// One VM: its console, its move if it is moving, what it uses, what it is, what happened to it.

import { classes, html } from '../lib/ui.js';
import { ago, bytes, capital, mib, percent, rate, words } from '../lib/format.js';
import { find, memoryFollows, migrationOf, migrationsOf, waitsForMemory } from '../lib/pool.js';
import { cancelOperation, vmIntents } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { useNow } from '../lib/clock.js';
import { Actions } from '../parts/actions.js';
import { EventLines } from '../parts/event-list.js';
import { EndedMigration, LiveMigration, MigrationHistory } from '../parts/migration.js';
import { Empty } from '../parts/placeholder.js';
import { Sparkline } from '../parts/sparkline.js';
import { State } from '../parts/state.js';
import { Terminal } from '../parts/terminal.js';
import { PageHead } from './page.js';

const EVENTS_SHOWN = 30;
const JUST_ENDED_MS = 5 * 60_000;
const POLICIES = { migrate: 'moves live', restart_elsewhere: 'restarts elsewhere',
  stop_and_return: 'stops, starts again afterwards', block: 'waits for the operator' };
const LEASES = { watched: 'stops and starts elsewhere', unwatched: 'runs on; elsewhere only with proof' };

export function VmView({ pool, id }) {
  const now = useNow();
  const vm = find(pool, 'vm', id);
  const crumb = { href: '#/vms', text: 'VMs' };
  if (!vm) return html`<${PageHead} title=${id} crumb=${crumb} /><${Empty} title="There is no VM ${id}">It may have been deleted.<//>`;
  const migration = migrationOf(pool, vm);
  const history = migrationsOf(pool, vm.id);
  const ended = !migration && history[0]?.ended_at && now - new Date(history[0].ended_at) < JUST_ENDED_MS && history[0];
  const inTrouble = ['failed', 'unreachable', 'awaiting_fence'].includes(vm.state);
  const samples = pool.samples.get(vm.id);
  const events = pool.events.filter((event) => event.subject.id === vm.id).slice(0, EVENTS_SHOWN);
  return html`<${PageHead} title=${vm.name} crumb=${crumb} note=${html`<${State} kind="vm" state=${vm.state}
    testid="vm-state" />${vm.host_name && html`<span class="quiet">on <a href=${linkTo('hosts', vm.host_name)}
    data-testid="vm-host">${vm.host_name}</a>
    </span>`}`}>
      <${Actions} intents=${vmIntents(vm)} name=${vm.name} />
    <//>
    ${vm.reason && html`<div class="note ${inTrouble ? 'note-bad' : ''}"><p>${capital(vm.reason)}</p></div>`}
    <div class="detail">
      <div class="detail-main">
        ${migration && html`<div class="panel panel-busy">
          <${LiveMigration} migration=${migration} heading=${false}
            onCancel=${vm.operation && (!memoryFollows(migration) || waitsForMemory(vm)) ? () => cancelOperation(vm.operation, `Migrate ${vm.name}`) : null} />
          </div>`}
        ${ended && html`<${EndedMigration} migration=${ended} />`}
        <${Terminal} vm=${vm} />
        <section class="panel"><header class="panel-head"><h2>Migrations</h2><span class="quiet">${history.length || ''}</span></header>
          <${MigrationHistory} migrations=${history} /></section>
      </div>
      <div class="detail-side">
        <section class="panel"><header class="panel-head"><h2>Use</h2></header><div class=${classes(inTrouble && 'is-stale')}>
          <${Sparkline} label="CPU, of one core" text=${percent(vm.usage?.cpu_percent)} samples=${samples}
            value=${(sample) => sample.cpu_percent} max=${20} />
          <${Sparkline} label="Memory dirtied" text=${rate(vm.usage?.dirty_bytes_per_s)} samples=${samples}
            value=${(sample) => sample.dirty_bytes_per_s} max=${2 ** 20} />
          <dl class="facts"><div><dt>Resident</dt><dd>${bytes(vm.usage?.rss_bytes)}</dd></div><div><dt>Exits</dt>
            <dd>${Math.round(vm.usage?.exits_per_s ?? 0).toLocaleString('en')} /s</dd></div></dl>
        </div></section>
        <${Devices} vm=${vm} />
        <section class="panel"><header class="panel-head"><h2>Facts</h2></header><${Facts} pool=${pool} vm=${vm} now=${now} /></section>
        <section class="panel"><header class="panel-head"><h2>Events</h2></header>
          <${EventLines} events=${events} empty="No events about this VM." /></section>
      </div>
    </div>`;
}

/** Disks and network cards, if it has some. */
function Devices({ vm }) {
  const [disks, nics] = [vm.disks ?? [], vm.nics ?? []];
  if (disks.length + nics.length === 0) return null;
  const note = (disk) => [disk.image_name && `copy of ${disk.image_name}`, disk.pool_name && `in ${disk.pool_name}`,
    disk.access === 'read_only' && 'read only'].filter(Boolean).join(', ');
  return html`<section class="panel" data-testid="vm-devices"><header class="panel-head"><h2>Disks and network</h2></header>
    <dl class="facts">
      ${disks.map((disk) => html`<div key=${disk.name}><dt>${disk.name}</dt><dd>${bytes(disk.bytes)}
        <span class="quiet"> ${note(disk)}</span></dd></div>`)}
      ${nics.map((nic) => html`<div key=${nic.name}><dt>${nic.name}</dt><dd><span data-testid="vm-address">${nic.address ?? 'no address'}</span>
        <span class="quiet"> on </span>${nic.network ? html`<a href=${linkTo('networks', nic.network_name)}>${nic.network_name}</a>`
        : nic.network_name}<span class="quiet">, ${nic.mac}</span></dd></div>`)}
    </dl></section>`;
}

function Facts({ pool, vm, now }) {
  const { boot } = vm.spec;
  const home = vm.home && pool.host.get(vm.home);
  const facts = [
    ['vCPUs', vm.spec.vcpus], ['Memory', mib(vm.spec.memory_mib)], ['CPU level', vm.spec.cpu], ['Machine', vm.spec.machine_type],
    ['Boots', boot.kind === 'pilot' ? 'pilot' : boot.kernel],
    boot.initrd && ['Initrd', boot.initrd],
    boot.cmdline && ['Command line', boot.cmdline],
    ['Should be', words(vm.intent)], ['Home', home?.name ?? '–'],
    ['In maintenance', POLICIES[vm.maintenance_policy] ?? words(vm.maintenance_policy)],
    ['Post-copy', vm.post_copy === 'forbidden' ? 'forbidden' : 'allowed where a move asks for it'],
    ['Host silent', LEASES[vm.lease] ?? words(vm.lease)],
    ['Epoch', vm.epoch], ['Created', ago(vm.created_at, now)], ['Changed', ago(vm.changed_at, now)], ['Id', vm.id],
  ].filter(Boolean);
  return html`<dl class="facts">${facts.map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl>`;
}

// All VMs as a table.

import { html, useState } from '../lib/ui.js';
import { mib, percent, rate } from '../lib/format.js';
import { migrationOf, vms } from '../lib/pool.js';
import { createVm, vmIntents } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { phaseWords } from '../lib/tone.js';
import { Actions } from '../parts/actions.js';
import { Icon } from '../parts/icon.js';
import { CellBar, Progress } from '../parts/meter.js';
import { migrationShare } from '../parts/migration.js';
import { Empty } from '../parts/placeholder.js';
import { State } from '../parts/state.js';
import { Choice, FilterBox, matches, usePieces, useSort } from '../parts/table.js';
import { PageHead } from './page.js';

const KEYS = {
  name: (vm) => vm.name,
  state: (vm) => vm.state,
  host: (vm) => vm.host_name,
  vcpus: (vm) => vm.spec.vcpus,
  memory: (vm) => vm.spec.memory_mib,
  cpu: (vm) => vm.usage?.cpu_percent ?? 0,
  dirty: (vm) => vm.usage?.dirty_bytes_per_s ?? 0,
};

const NUMBERS = { vcpus: 'vCPUs', memory: 'Memory', cpu: 'CPU', dirty: 'Dirty rate' };
const UNMEASURED = ['unreachable', 'awaiting_fence', 'failed', 'stopped'];

const GROUPS = [
  ['running', 'Running', ['running']],
  ['moving', 'Moving', ['migrating']],
  ['paused', 'Paused', ['paused']],
  ['stopped', 'Stopped', ['stopped', 'stopping', 'starting', 'pending']],
  ['trouble', 'In trouble', ['failed', 'unreachable', 'awaiting_fence']],
];

export function VmsView({ pool }) {
  const [query, setQuery] = useState('');
  const [group, setGroup] = useState('all');
  const [sorted, header] = useSort(KEYS, 'name');
  const all = vms(pool);
  const states = GROUPS.find(([name]) => name === group)?.[2];
  const shown = all.filter((vm) => (!states || states.includes(vm.state)) && matches(query, vm.name, vm.state, vm.host_name));
  const [rows, more] = usePieces(sorted(shown));
  const options = GROUPS.map(([name, text, members]) => [name, text, all.filter((vm) => members.includes(vm.state)).length])
    .filter(([name, , number]) => number > 0 || name === group);
  return html`<${PageHead} title="VMs" note=${html`<span class="page-count">${all.length}</span>`}>
      <button type="button" class="button button-primary" data-testid="create-vm-open" onClick=${createVm}>
        <${Icon} name="plus" />Create VM</button>
    <//>
    <div class="toolbar">
      <${FilterBox} label="Filter VMs" value=${query} onInput=${setQuery} />
      <${Choice} label="State" value=${group} onChange=${setGroup} options=${[['all', 'All', all.length], ...options]} />
    </div>
    ${all.length === 0
      ? html`<${Empty} title="No VMs yet"><button type="button" class="link" onClick=${createVm}>Create the first one.</button><//>`
      : shown.length === 0
        ? html`<${Empty} title="No VM matches">
          <button type="button" class="link" onClick=${() => { setQuery(''); setGroup('all'); }}>Show all</button><//>`
        : html`<div class="scroll"><table class="table vms" data-testid="vms">
            <thead><tr>
              ${header('name', 'Name')}${header('state', 'State')}${header('host', 'Host')}
              ${['vcpus', 'memory', 'cpu', 'dirty'].map((name) => header(name, NUMBERS[name], 'number'))}
              <th scope="col"><span class="hidden">Actions</span></th>
            </tr></thead>
            <tbody>${rows.map((vm) => html`<${Row} key=${vm.id} pool=${pool} vm=${vm} />`)}</tbody>
          </table></div>`}
    ${more}`;
}

const NOTHING = html`<span class="quiet">–</span>`;

function Row({ pool, vm }) {
  const measured = vm.host && !UNMEASURED.includes(vm.state);
  const migration = migrationOf(pool, vm);
  const away = vm.home && vm.host && vm.home !== vm.host && pool.host.get(vm.home);
  return html`<tr data-testid="vm-${vm.name}" data-state=${vm.state} data-host=${vm.host_name}>
    <td><a class="name" href=${linkTo('vms', vm.name)}>${vm.name}</a></td>
    <td>${migration
      ? html`<span class="cell-migration"><${State} kind="vm" state="migrating" /><span class="quiet">${phaseWords(migration.phase)}</span>
        <${Progress} share=${migrationShare(migration)} label="Migration of ${vm.name}" thin /></span>`
      : html`<${State} kind="vm" state=${vm.state} reason=${vm.reason} />`}</td>
    <td>
      ${vm.host_name ? html`<a href=${linkTo('hosts', vm.host_name)}>${vm.host_name}</a>` : NOTHING}
      ${migration && html`<span class="way"> → ${migration.target_name}</span>`}
      ${!migration && away && html`<span class="quiet"> (home: ${away.name})</span>`}
    </td>
    <td class="number">${vm.spec.vcpus}</td>
    <td class="number">${mib(vm.spec.memory_mib)}</td>
    <td class="number">${measured
      ? html`<${CellBar} share=${vm.usage.cpu_percent / (100 * vm.spec.vcpus)} text=${percent(vm.usage.cpu_percent)} label="CPU of ${vm.name}" />`
      : NOTHING}</td>
    <td class="number">${measured ? rate(vm.usage.dirty_bytes_per_s) : NOTHING}</td>
    <td class="tools"><${Actions} intents=${vmIntents(vm)} name=${vm.name} small /></td>
  </tr>`;
}

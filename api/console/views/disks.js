// All disks.

import { html, useState } from '../lib/ui.js';
import { ago, bytes } from '../lib/format.js';
import { disks } from '../lib/pool.js';
import { createDisk, diskIntents } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { useNow } from '../lib/clock.js';
import { Actions } from '../parts/actions.js';
import { Icon } from '../parts/icon.js';
import { Empty } from '../parts/placeholder.js';
import { State } from '../parts/state.js';
import { Choice, FilterBox, matches, usePieces, useSort } from '../parts/table.js';
import { PageHead } from './page.js';

const KEYS = { name: (disk) => disk.name, state: (disk) => disk.state, pool: (disk) => disk.pool_name,
  size: (disk) => disk.bytes ?? 0, image: (disk) => disk.image_name, vm: (disk) => disk.attached_to_name };
const NOTHING = html`<span class="quiet">–</span>`;

export function DisksView({ pool }) {
  const now = useNow();
  const [query, setQuery] = useState('');
  const [group, setGroup] = useState('all');
  const [sorted, header] = useSort(KEYS, 'name');
  const all = disks(pool);
  const free = all.filter((disk) => !disk.attached_to);
  const shown = sorted((group === 'free' ? free : all)
    .filter((disk) => matches(query, disk.name, disk.pool_name, disk.image_name, disk.attached_to_name)));
  const [rows, more] = usePieces(shown);
  return html`<${PageHead} title="Disks" note=${html`<span class="page-count">${all.length}</span>`}>
      <button type="button" class="button button-primary" data-testid="create-disk-open" disabled=${pool.pool.size === 0}
        onClick=${() => createDisk()}><${Icon} name="plus" />Create disk</button>
    <//>
    <div class="toolbar">
      <${FilterBox} label="Filter disks" value=${query} onInput=${setQuery} />
      <${Choice} label="Use" value=${group} onChange=${setGroup}
        options=${[['all', 'All', all.length], ['free', 'Without a VM', free.length]]} />
    </div>
    ${all.length === 0
      ? html`<${Empty} title="No disks yet">A VM gets its disks when it is created; others can be made here.<//>`
      : shown.length === 0
        ? html`<${Empty} title="No disk matches">
          <button type="button" class="link" onClick=${() => { setQuery(''); setGroup('all'); }}>Show all</button><//>`
        : html`<div class="scroll"><table class="table" data-testid="disks">
          <thead><tr>${header('name', 'Name')}${header('state', 'State')}${header('size', 'Size', 'number')}${header('pool', 'Pool')}
            <th scope="col">Format</th>${header('image', 'Image')}${header('vm', 'VM')}<th scope="col">Created</th>
            <th scope="col"><span class="hidden">Actions</span></th></tr></thead>
          <tbody>${rows.map((disk) => html`<tr key=${disk.id} data-testid="disk-${disk.name}">
            <td><span class="name">${disk.name}</span></td>
            <td><${State} kind="disk" state=${disk.state} reason=${disk.reason} /></td>
            <td class="number">${bytes(disk.bytes)}</td>
            <td>${disk.pool_name}</td><td>${disk.format}</td>
            <td>${disk.image_name ?? NOTHING}</td>
            <td>${disk.attached_to_name ? html`<a href=${linkTo('vms', disk.attached_to_name)}>${disk.attached_to_name}</a>` : NOTHING}</td>
            <td class="number-left">${ago(disk.created_at, now)}</td>
            <td class="tools"><${Actions} intents=${diskIntents(disk)} name=${disk.name} small /></td>
          </tr>`)}</tbody>
        </table></div>`}
    ${more}`;
}

// All images, and the storage pools they and the disks are kept in.

import { html, useState } from '../lib/ui.js';
import { ago, bytes } from '../lib/format.js';
import { images, pools } from '../lib/pool.js';
import { createImage, imageIntents } from '../intents.js';
import { useNow } from '../lib/clock.js';
import { Actions } from '../parts/actions.js';
import { Icon } from '../parts/icon.js';
import { Empty } from '../parts/placeholder.js';
import { State } from '../parts/state.js';
import { FilterBox, matches, usePieces, useSort } from '../parts/table.js';
import { PageHead } from './page.js';

const KEYS = { name: (image) => image.name, state: (image) => image.state, pool: (image) => image.pool_name,
  size: (image) => image.virtual_bytes, file: (image) => image.file_bytes, disks: (image) => image.disks };

export function ImagesView({ pool }) {
  const now = useNow();
  const [query, setQuery] = useState('');
  const [sorted, header] = useSort(KEYS, 'name');
  const all = images(pool);
  const shown = sorted(all.filter((image) => matches(query, image.name, image.state, image.pool_name)));
  const [rows, more] = usePieces(shown);
  return html`<${PageHead} title="Images" note=${html`<span class="page-count">${all.length}</span>`}>
      <button type="button" class="button button-primary" data-testid="create-image-open" disabled=${pool.pool.size === 0}
        onClick=${createImage}><${Icon} name="plus" />Import image</button>
    <//>
    ${all.length > 0 && html`<div class="toolbar"><${FilterBox} label="Filter images" value=${query} onInput=${setQuery} /></div>`}
    ${all.length === 0
      ? html`<${Empty} title="No images yet">Import a raw or qcow2 disk image; VMs get thin copies of it.<//>`
      : shown.length === 0
        ? html`<${Empty} title="No image matches"><button type="button" class="link" onClick=${() => setQuery('')}>Show all</button><//>`
        : html`<div class="scroll"><table class="table" data-testid="images">
          <thead><tr>${header('name', 'Name')}${header('state', 'State')}${header('pool', 'Pool')}<th scope="col">Format</th>
            ${header('size', 'Size', 'number')}${header('file', 'In the pool', 'number')}${header('disks', 'Disks', 'number')}
            <th scope="col">Created</th><th scope="col"><span class="hidden">Actions</span></th></tr></thead>
          <tbody>${rows.map((image) => html`<tr key=${image.id} data-testid="image-${image.name}">
            <td><span class="name">${image.name}</span></td>
            <td><${State} kind="image" state=${image.state} reason=${image.reason} /></td>
            <td>${image.pool_name}</td>
            <td>${image.format ?? html`<span class="quiet">–</span>`}</td>
            <td class="number">${bytes(image.virtual_bytes || null)}</td>
            <td class="number">${bytes(image.file_bytes || null)}</td>
            <td class="number">${image.disks}</td>
            <td class="number-left">${ago(image.created_at, now)}</td>
            <td class="tools"><${Actions} intents=${imageIntents(image)} name=${image.name} small /></td>
          </tr>`)}</tbody>
        </table></div>`}
    ${more}
    <h2 class="beneath">Storage pools</h2>
    <${Pools} pool=${pool} />`;
}

/** Where images and disks are kept, and how much room is left there. */
export function Pools({ pool }) {
  const all = pools(pool);
  if (all.length === 0) {
    return html`<div class="note"><p>No host has a storage pool. Start one with <code>--storage NAME=DIRECTORY</code>;
      a directory that several hosts see is shared, and VMs on it can move.</p></div>`;
  }
  return html`<div class="scroll"><table class="table" data-testid="pools">
    <thead><tr><th scope="col">Name</th><th scope="col">Seen by</th><th scope="col" class="number">Free</th>
      <th scope="col" class="number">Of</th></tr></thead>
    <tbody>${all.map((one) => {
      const trouble = one.hosts.find((host) => host.trouble);
      return html`<tr key=${one.id}>
        <td><span class="name">${one.name}</span> <span class="quiet">${one.shared ? 'shared by its hosts' : 'on one host only'}</span></td>
        <td class="wrap">${one.hosts.map((host) => host.host_name).join(', ')}${trouble && html` <span
          class="state state-warn"><span class="dot" aria-hidden="true"></span>${one.hosts.length > 1 ? `${trouble.host_name}: ` : ''}${trouble.trouble}</span>`}</td>
        <td class="number">${bytes(one.free_bytes)}</td><td class="number">${bytes(one.total_bytes)}</td>
      </tr>`;
    })}</tbody>
  </table></div>`;
}

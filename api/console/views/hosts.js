// All hosts.

import { html, useState } from '../lib/ui.js';
import { hosts } from '../lib/pool.js';
import { addHost, maintain } from '../intents.js';
import { HostCard } from '../parts/host-card.js';
import { Icon } from '../parts/icon.js';
import { Empty } from '../parts/placeholder.js';
import { Choice, FilterBox, matches, usePieces } from '../parts/table.js';
import { PageHead } from './page.js';

const STATES = [['up', 'Up'], ['cordoned', 'Cordoned'], ['maintenance', 'Maintenance'], ['unreachable', 'Unreachable']];

export function HostsView({ pool }) {
  const [query, setQuery] = useState('');
  const [state, setState] = useState('all');
  const all = hosts(pool);
  const number = (name) => all.filter((host) => host.state === name).length;
  const shown = all.filter((host) => (state === 'all' || host.state === state) && matches(query, host.name, host.state, host.address));
  const [pieces, more] = usePieces(shown);
  return html`<${PageHead} title="Hosts" note=${html`<span class="page-count">${all.length}</span>`}>
      <button type="button" class="button" data-testid="maintenance-open-any" disabled=${all.length === 0}
        onClick=${() => maintain()}>Plan maintenance…</button>
      <button type="button" class="button button-primary" data-testid="add-host-open" onClick=${addHost}>
        <${Icon} name="plus" />Add host</button>
    <//>
    <div class="toolbar">
      <${FilterBox} label="Filter hosts" value=${query} onInput=${setQuery} />
      <${Choice} label="State" value=${state} onChange=${setState}
        options=${[['all', 'All', all.length], ...STATES.map(([name, text]) => [name, text, number(name)])
        .filter(([name, , count]) => count > 0 || name === state)]} />
    </div>
    ${all.length === 0
      ? html`<${Empty} title="No hosts yet">
        <button type="button" class="link" onClick=${addHost}>Create a join token</button> and run the command it shows on the first host.<//>`
      : shown.length === 0
        ? html`<${Empty} title="No host matches">
          <button type="button" class="link" onClick=${() => { setQuery(''); setState('all'); }}>Show all</button><//>`
        : html`<div class="host-grid">${pieces.map((host) => html`<${HostCard} key=${host.id} pool=${pool} host=${host} />`)}</div>`}
    ${more}`;
}

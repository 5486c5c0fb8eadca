// What the controller does and did.

import { html, useState } from '../lib/ui.js';
import { isRunning, operations, operationTitle } from '../lib/pool.js';
import { OperationRow } from '../parts/operation.js';
import { Empty } from '../parts/placeholder.js';
import { Choice, FilterBox, matches, usePieces } from '../parts/table.js';
import { PageHead } from './page.js';

export function OperationsView({ pool, id }) {
  const [query, setQuery] = useState('');
  const [group, setGroup] = useState('all');
  const all = operations(pool);
  const groups = { all: () => true, running: isRunning, failed: (operation) => operation.state === 'failed' };
  const shown = all.filter((operation) => groups[group](operation) && matches(query, operationTitle(operation), operation.state, operation.actor));
  const [rows, more] = usePieces(shown);
  const number = (name) => all.filter(groups[name]).length;
  return html`<${PageHead} title="Operations" />
    <div class="toolbar">
      <${FilterBox} label="Filter operations" value=${query} onInput=${setQuery} />
      <${Choice} label="Which" value=${group} onChange=${setGroup} options=${[['all', 'All', all.length],
        ['running', 'Running', number('running')], ['failed', 'Failed', number('failed')]]} />
    </div>
    ${shown.length === 0
      ? html`<${Empty} title=${all.length ? 'No operation matches' : 'Nothing has been asked for yet'} />`
      : html`<div class="scroll"><table class="table" data-testid="operations">
          <thead><tr><th scope="col">Operation</th><th scope="col">State</th><th scope="col" class="progress-cell">Progress</th>
            <th scope="col">Began</th><th scope="col" class="number">Took</th><th scope="col">By</th><th scope="col">
            <span class="hidden">Actions</span></th></tr></thead>
          <tbody>${rows.map((operation) => html`<${OperationRow} key=${operation.id} operation=${operation} open=${operation.id === id} />`)}</tbody>
        </table></div>`}
    ${more}`;
}

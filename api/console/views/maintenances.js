// All maintenances.

import { html } from '../lib/ui.js';
import { between, time } from '../lib/format.js';
import { maintenances } from '../lib/pool.js';
import { maintain } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { useNow } from '../lib/clock.js';
import { Icon } from '../parts/icon.js';
import { Empty } from '../parts/placeholder.js';
import { State } from '../parts/state.js';
import { usePieces } from '../parts/table.js';
import { PageHead } from './page.js';

export function MaintenancesView({ pool }) {
  const now = useNow();
  const all = maintenances(pool);
  const [rows, more] = usePieces(all);
  const plan = html`<button type="button" class="button button-primary" data-testid="maintenance-open" onClick=${() => maintain()}>
    <${Icon} name="plus" />Plan maintenance</button>`;
  return html`<${PageHead} title="Maintenance">${plan}<//>
    ${all.length === 0
      ? html`<${Empty}
        title="No maintenance yet">Plan one before you patch, reboot or repair a host: its VMs move away without stopping and come home afterwards.<//>`
      : html`<div class="scroll"><table class="table" data-testid="maintenances">
          <thead><tr><th scope="col">Host</th><th scope="col">State</th><th scope="col">Reason</th><th scope="col" class="number">VMs</th>
            <th scope="col">Created</th><th scope="col" class="number">Took</th><th scope="col">By</th></tr></thead>
          <tbody>${rows.map((maintenance) => html`<tr key=${maintenance.id}>
            <td><a class="name" href=${linkTo('maintenance', maintenance.id)}>${maintenance.host_name}</a></td>
            <td><${State} kind="maintenance" state=${maintenance.state} reason=${maintenance.detail} /></td>
            <td class="wrap">${maintenance.reason || html`<span class="quiet">–</span>`}</td>
            <td class="number">${Math.max(maintenance.plan.moves.length, maintenance.moved.length)}</td>
            <td class="number-left">${time(maintenance.created_at)}</td>
            <td class="number">${between(maintenance.created_at, maintenance.ended_at, now)}</td>
            <td class="quiet">${maintenance.actor}</td>
          </tr>`)}</tbody>
        </table></div>`}
    ${more}`;
}

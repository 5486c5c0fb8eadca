// One maintenance: where it stands, what each VM does, and the next step for the operator.

import { classes, html } from '../lib/ui.js';
import { post } from '../lib/api.js';
import { ago, inMib, milliseconds, mib, seconds, time, words } from '../lib/format.js';
import { isOpen, migrationOf, migrationsOf } from '../lib/pool.js';
import { linkTo } from '../lib/router.js';
import { useNow } from '../lib/clock.js';
import { CancelMaintenanceDialog } from '../dialogs/cancel-maintenance.js';
import { RETURN_POLICIES } from '../dialogs/maintenance.js';
import { confirm, openDialog } from '../parts/dialog.js';
import { Icon } from '../parts/icon.js';
import { Progress } from '../parts/meter.js';
import { LiveMigration, migrationShare } from '../parts/migration.js';
import { perform } from '../parts/notices.js';
import { Empty } from '../parts/placeholder.js';
import { MaintenancePlan } from '../parts/plan.js';
import { State } from '../parts/state.js';
import { PageHead } from './page.js';

const RAIL = ['planned', 'ready', 'cordoned', 'draining', 'drained', 'working', 'verifying', 'restoring', 'done'];
const ONLY_PLANNED = ['planned', 'blocked', 'ready'];
/** How a VM leaves, in a table where some have left already. */
const WAYS = { migrate: 'live', restart_elsewhere: 'restart', stop_and_return: 'stopped meanwhile' };
const MEANING = {
  planned: 'The plan is being made.',
  blocked: 'Something must be put right before it can start.',
  ready: 'The plan is made. Nothing moves before you start it.',
  cordoned: 'The host takes no new VMs.',
  draining: 'VMs are leaving the host without stopping.',
  drained: 'The host is empty. Patch, reboot or repair it, then finish.',
  working: 'The host is being worked on. Finish when it is back.',
  verifying: 'The host is being checked before it takes VMs again.',
  restoring: 'VMs are coming home.',
  done: 'Finished. The host takes VMs again.',
  cancelling: 'It is being called off; the move in flight is finished first.',
  cancelled: 'It was called off. The host takes VMs again.',
  failed: 'It could not go on. The host stays cordoned, every VM runs where it is. Try again or cancel.',
};

export function MaintenanceView({ pool, id }) {
  const maintenance = pool.maintenance.get(id);
  const crumb = { href: '#/maintenance', text: 'Maintenance' };
  if (!maintenance) return html`<${PageHead} title="Maintenance" crumb=${crumb} /><${Empty} title="There is no such maintenance" />`;
  const { state, policy } = maintenance;
  const moving = rowsOf(pool, maintenance).map((row) => row.migration).filter(Boolean);
  return html`<${PageHead} title=${maintenance.host_name} crumb=${crumb} note=${html`<${State} kind="maintenance" state=${state}
    testid="maintenance-state" />`}>
      <${Steps} maintenance=${maintenance} />
    <//>
    <${Rail} state=${state} />
    <p class="maintenance-meaning" role="status">${MEANING[state] ?? words(state)}${maintenance.detail
      && html` <strong>${maintenance.detail}</strong>`}</p>
    <div class="detail">
      <div class="detail-main">
        ${moving.map((migration) => html`<div key=${migration.id} class="panel panel-busy"><${LiveMigration} migration=${migration} />
          </div>`)}
        ${ONLY_PLANNED.includes(state)
          ? html`<section class="panel"><header class="panel-head"><h2>The plan</h2></header><${MaintenancePlan} plan=${maintenance.plan} />
            </section>`
          : html`<${Moves} pool=${pool} maintenance=${maintenance} />`}
      </div>
      <div class="detail-side"><section class="panel"><header class="panel-head"><h2>Facts</h2></header><dl class="facts">
        <div><dt>Host</dt><dd><a href=${linkTo('hosts', maintenance.host_name)}>${maintenance.host_name}</a></dd></div>
        <div><dt>Reason</dt><dd>${maintenance.reason || '–'}</dd></div>
        <div><dt>Afterwards</dt><dd>${RETURN_POLICIES[policy.return]}</dd></div>
        <div><dt>Created</dt><dd>${time(maintenance.created_at)} by ${maintenance.actor}</dd></div>
        ${maintenance.ended_at && html`<div><dt>Ended</dt><dd>${time(maintenance.ended_at)}</dd></div>`}
      </dl></section></div>
    </div>`;
}

/** What the operator can do now. */
function Steps({ maintenance }) {
  const { id, state, host_name: host } = maintenance;
  const ask = (verb, what, body) => perform(`${what} maintenance of ${host}`, () => post(`/v1/maintenances/${id}/${verb}`, body));
  const start = () => ask('start', 'Start');
  const finish = async () => {
    const sure = await confirm({ title: `Finish the maintenance of ${host}?`,
      text: 'The host is checked, takes VMs again, and those that left come back as planned.', verb: 'Finish' });
    if (sure) await ask('finish', 'Finish');
  };
  const cancel = async () => {
    const away = maintenance.moved.filter((move) => move.state === 'away').length;
    const choice = await openDialog(CancelMaintenanceDialog, { maintenance, away });
    if (choice) await ask('cancel', 'Cancel', choice);
  };
  const cancellable = isOpen(maintenance) && !['cancelling', 'restoring', 'verifying'].includes(state);
  return html`
    ${cancellable && html`<button type="button" class="button" data-testid="maintenance-cancel" onClick=${cancel}>Cancel…</button>`}
    ${(state === 'ready' || state === 'failed') && html`<button type="button" class="button button-primary" data-testid="maintenance-start"
      onClick=${start}>${state === 'failed' ? 'Try again' : 'Start'}</button>`}
    ${(state === 'drained' || state === 'working') && html`<button type="button" class="button button-primary"
      data-testid="maintenance-finish" onClick=${finish}>Finish…</button>`}`;
}

/** The states in order, with those behind, the one now and those ahead. */
function Rail({ state }) {
  // States off the straight way are shown at the place they branch off.
  const beside = { blocked: 'ready', cancelling: 'draining', cancelled: 'draining', failed: 'draining' };
  const at = RAIL.indexOf(beside[state] ?? state);
  const halted = ['blocked', 'failed', 'cancelled'].includes(state);
  return html`<ol class="rail" aria-label="Way of the maintenance">${RAIL.map((step, index) => {
    const done = index < at || state === 'done';
    const now = index === at && state !== 'done';
    return html`<li key=${step} class=${classes(done && 'is-done', now && 'is-now', now && halted && 'is-halted')} aria-current=${now ? 'step' : null}>
      <span class="rail-mark" aria-hidden="true">${done && html`<${Icon} name="check" />`}</span>
        <span class="rail-name">${now ? words(state) : step}</span>
    </li>`;
  })}</ol>`;
}

/** Every VM of the plan and every one moved, once. */
function rowsOf(pool, maintenance) {
  const rows = new Map();
  for (const planned of maintenance.plan.moves) rows.set(planned.vm, { planned, vm: planned.vm, name: planned.vm_name });
  for (const moved of maintenance.moved) rows.set(moved.vm, { ...rows.get(moved.vm), moved, vm: moved.vm, name: moved.vm_name });
  return [...rows.values()].map((row) => {
    const vm = pool.vm.get(row.vm);
    const migration = vm && isOpen(maintenance) ? migrationOf(pool, vm) : undefined;
    const past = migrationsOf(pool, row.vm)
      .filter((m) => m.state === 'committed' && m.started_at >= maintenance.created_at && (!maintenance.ended_at || m.started_at <= maintenance.ended_at));
    // The record follows the move after a moment; the VM itself tells it at once.
    const gone = past.length > 0 && vm?.host !== maintenance.host;
    const state = migration ? 'moving' : (row.moved?.state ?? (gone ? 'away' : 'waiting'));
    return { ...row, current: vm, migration, past, state };
  });
}

function Moves({ pool, maintenance }) {
  const now = useNow();
  const rows = rowsOf(pool, maintenance);
  const settled = rows.filter((row) => row.moved || row.state === 'away').length;
  const returning = ['restoring', 'done', 'cancelled'].includes(maintenance.state);
  const number = (state) => rows.filter((row) => row.moved?.state === state).length;
  const [back, stayed] = [number('returned'), number('stayed')];
  const staying = stayed ? `, ${stayed} stay where they are` : '';
  const sum = returning ? `${back} of ${rows.length} are back${staying}` : `${settled} of ${rows.length} have left`;
  const share = (returning ? back + stayed : settled) / rows.length;
  return html`<section class="panel">
    <header class="panel-head"><h2>VMs</h2>
      <span class="quiet" data-testid="maintenance-count">${sum}</span></header>
    ${rows.length === 0 ? html`<p class="quiet">The host had no VMs.</p>` : html`
      <${Progress} share=${share} label="VMs" thin tone=${share === 1 ? 'ok' : 'busy'} />
      <div class="scroll"><table class="table" data-testid="moves">
        <thead><tr><th scope="col">VM</th><th scope="col">State</th><th scope="col">Way out</th><th scope="col">Runs on</th>
          <th scope="col" class="number">Predicted</th><th scope="col" class="number">Sent</th><th scope="col" class="number">Downtime</th>
          </tr></thead>
        <tbody>${rows.map((row) => html`<${MoveRow} key=${row.vm} row=${row} now=${now} />`)}</tbody>
      </table></div>`}
  </section>`;
}

function MoveRow({ row, now }) {
  const { planned, moved, migration, past, current, state } = row;
  const action = planned?.action ?? moved?.action;
  // Newest first; after the return there are two, and both count.
  const downtime = past.map((m) => (m.progress.downtime_us === undefined ? '–' : milliseconds(m.progress.downtime_us / 1000))).reverse().join(', ');
  return html`<tr data-testid="move-${row.name}" data-state=${state}>
    <td><a class="name" href=${linkTo('vms', row.name)}>${row.name}</a></td>
    <td>${migration ? html`<span class="cell-migration"><${State} kind="move" state="moving" />
      <${Progress} share=${migrationShare(migration)} label="Migration of ${row.name}" thin />
      </span>` : html`<${State} kind="move" state=${state} reason=${moved?.reason} />`}${moved?.reason && html`<div
        class="quiet wrap">${moved.reason}</div>`}</td>
    <td class="nowrap">${WAYS[action] ?? words(action)}${planned?.to_name && html`, to ${planned.to_name}`}</td>
    <td>${current?.host_name ?? html`<span class="quiet">–</span>`}</td>
    <td
      class="number quiet">${planned ? `${seconds(planned.predicted_s)}, ${planned.action === 'migrate' ? mib(planned.predicted_mib) : 'down'}` : '–'}</td>
    <td class="number">${past.length ? `${inMib(past.reduce((sum, m) => sum + m.progress.transferred_bytes, 0))} MiB` : '–'}</td>
    <td class="number" title=${past[0] ? `last move ${ago(past[0].ended_at, now)}` : null}>${downtime || '–'}</td>
  </tr>`;
}

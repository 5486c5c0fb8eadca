// The dry run of a maintenance: every move, what it costs, what is left, and what stands in the way.

import { classes, html } from '../lib/ui.js';
import { count, mib, milliseconds, seconds } from '../lib/format.js';
import { Icon } from './icon.js';

const MOVE_ACTIONS = { migrate: 'moves live', restart_elsewhere: 'restarts', stop_and_return: 'stops until finished' };

const OVERRIDES = { restart_elsewhere: 'Restart it elsewhere', stop_and_return: 'Stop it until finished' };

/** `onOverride(vm, policy)` offers another policy for the VMs in the way; without it the plan is only shown. */
export function MaintenancePlan({ plan, overrides = {}, onOverride }) {
  return html`<div class="plan" data-testid="plan">
    ${plan.blockers.length > 0 && html`<section class="blockers" aria-label="What stands in the way">
      ${plan.blockers.map((blocker) => html`<${Blocker} key="${blocker.kind}-${blocker.vm}" blocker=${blocker} onOverride=${onOverride} />`)}
    </section>`}
    <p class="plan-sum">${summary(plan)}</p>
    ${plan.moves.length > 0 && html`<div class="scroll"><table class="table">
      <thead><tr>
        <th scope="col" class="number narrow">#</th><th scope="col">VM</th><th scope="col">What happens</th>
        <th scope="col" class="number">Time</th><th scope="col" class="number">To send</th><th scope="col" class="number">Blackout</th>
        <th scope="col" class="number" title="Guest memory that would be left after this step if the largest of the other hosts failed">Reserve after</th>
      </tr></thead>
      <tbody>${plan.moves.map((move, index) => html`<tr key=${move.vm} data-testid="planned-${move.vm_name}">
        <td class="number quiet">${index + 1}</td>
        <td><strong>${move.vm_name}</strong></td>
        <td>${MOVE_ACTIONS[move.action] ?? move.action}${move.to_name && html` to <strong>${move.to_name}</strong>`}${overrides[move.vm]
          && html` <span class="tag">your choice</span>`}</td>
        <td class="number">${seconds(move.predicted_s)}</td>
        <td class="number">${move.action === 'migrate' ? mib(move.predicted_mib) : '–'}</td>
        <td class=${classes('number', move.action !== 'migrate' && 'is-warn')}>${blackout(move)}</td>
        <td class=${classes('number', move.reserve_after_mib < 0 && 'is-bad')}>${reserve(move.reserve_after_mib)}</td>
      </tr>`)}</tbody>
    </table></div>`}
    ${plan.moves.some((move) => move.reserve_after_mib < 0) && html`<div class="note note-warn"><p>
      <strong>The reserve goes below zero.</strong> Should another host fail during this maintenance, not every VM could start again.</p>
      </div>`}
  </div>`;
}

const blackout = (move) => (move.action === 'stop_and_return' ? 'until finished' : milliseconds(move.predicted_blackout_ms));
const reserve = (left) => (left < 0 ? `−${mib(-left)}` : mib(left));

function summary(plan) {
  const live = plan.moves.filter((move) => move.action === 'migrate');
  const down = plan.moves.length - live.length;
  if (plan.moves.length === 0) return plan.blockers.length ? 'Nothing can be moved yet.' : 'The host has no VMs; it is empty at once.';
  const parts = [];
  if (live.length) {
    const blackout = Math.max(...live.map((move) => move.predicted_blackout_ms));
    parts.push(`${count(live.length, 'VM')} ${live.length === 1 ? 'moves' : 'move'} live, each paused for at most about ${milliseconds(blackout)}`);
  }
  if (down) parts.push(`${count(down, 'VM')} ${down === 1 ? 'goes' : 'go'} down for a while`);
  return `${parts.join('; ')}. The host is empty after about ${seconds(plan.total_s)}.`;
}

function Blocker({ blocker, onOverride }) {
  return html`<div class="note note-warn blocker" data-testid="blocker">
    <${Icon} name="alert" />
    <div>
      <strong>${blocker.vm_name ?? 'The host'}: ${blocker.detail}</strong>
      <p class="remedy"><span>What to do:</span> ${blocker.remedy}</p>
      ${onOverride && blocker.vm && html`<p
        class="blocker-choices">For this maintenance: ${Object.entries(OVERRIDES).map(([policy, text]) => html`<button key=${policy}
        type="button" class="button button-small" onClick=${() => onOverride(blocker.vm, policy)}>${text}</button>`)}</p>`}
    </div>
  </div>`;
}

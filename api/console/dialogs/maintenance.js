// Planning a maintenance: first what would happen, then, if the operator agrees, the start.
//
//   choose host, reason, return ──plan──► the dry run ──start──► the maintenance exists and drains
//                ▲                           │
//                └────────── change ─────────┘   (another policy for a VM plans again)

import { html, useState } from '../lib/ui.js';
import { post, tryPost } from '../lib/api.js';
import { hosts } from '../lib/pool.js';
import { store } from '../lib/store.js';
import { Dialog } from '../parts/dialog.js';
import { Field, fieldError } from '../parts/field.js';
import { MaintenancePlan } from '../parts/plan.js';
import { notifyProblem } from '../parts/notices.js';
import { ProblemNote } from '../parts/problem.js';
import { useRequest } from './form.js';

export const RETURN_POLICIES = {
  exact: 'Every VM comes home',
  rebalance: 'As many come home as makes the pool even',
  none: 'They stay where they went',
};

export function MaintenanceDialog({ host, close }) {
  const candidates = hosts(store).filter((candidate) => !candidate.maintenance && candidate.state !== 'joining');
  const [form, setForm] = useState({ host: host?.name ?? '', reason: '', returning: 'exact' });
  const [overrides, setOverrides] = useState({});
  const [plan, setPlan] = useState(null);
  const [busy, problem, run] = useRequest();

  const request = (others) => ({
    host: form.host,
    reason: form.reason,
    return: form.returning,
    overrides: Object.entries(others).map(([vm, policy]) => ({ vm, policy })),
  });
  const makePlan = (others) => run(async () => {
    const answer = await tryPost('/v1/maintenances', request(others));
    setPlan(answer.plan);
  });
  const submitForm = (event) => {
    event.preventDefault();
    makePlan(overrides);
  };
  const override = (vm, policy) => {
    const next = { ...overrides, [vm]: policy };
    setOverrides(next);
    makePlan(next);
  };
  const start = () => run(async () => {
    const { maintenance } = await post('/v1/maintenances', request(overrides));
    // It exists from here on: when the start fails, its own page says why and offers to try again.
    try {
      await post(`/v1/maintenances/${maintenance.id}/start`);
    } catch (error) {
      notifyProblem(`Start maintenance of ${form.host}`, error);
    }
    close(maintenance);
  });
  const bind = (field) => ({ value: form[field], onInput: (event) => setForm({ ...form, [field]: event.target.value }) });

  if (!plan) {
    return html`<${Dialog} key="form" title="Plan a maintenance" close=${close} testid="maintenance-dialog">
      <form onSubmit=${submitForm} class="dialog-form">
        <div class="dialog-body">
          <p class="lead">Its VMs move to other hosts without stopping; you work on it; they come back. Nothing moves before you have seen the plan.</p>
          <div class="fields">
            <${Field} label="Host" error=${fieldError(problem, 'host')} wide>
              <select ...${bind('host')} required autofocus=${!host} data-testid="maintenance-host">
              <option value="" disabled>Choose a host</option>${candidates.map((candidate) => html`<option key=${candidate.id}
                value=${candidate.name}>${candidate.name}</option>`)}</select>
              <//>
            <${Field} label="Reason" hint="everyone who looks will see it" error=${fieldError(problem, 'reason')} wide>
              <input ...${bind('reason')} autofocus=${Boolean(host)} placeholder="kernel update" autocomplete="off" data-testid="maintenance-reason" />
              <//>
            <${Field} label="Afterwards" error=${fieldError(problem, 'return')} wide>
              <select ...${bind('returning')}
                data-testid="maintenance-return">${Object.entries(RETURN_POLICIES).map(([value, text]) => html`<option key=${value}
                value=${value}>${text}</option>`)}</select>
              <//>
          </div>
          <${ProblemNote} problem=${problem} />
        </div>
        <footer class="dialog-foot">
          <button type="button" class="button" onClick=${() => close()}>Cancel</button>
          <button type="submit" class="button button-primary" disabled=${busy}
            data-testid="maintenance-plan">${busy ? 'Planning…' : 'Show the plan'}</button>
        </footer>
      </form>
    <//>`;
  }
  const blocked = plan.blockers.length > 0;
  return html`<${Dialog} key="plan" title="Maintenance of ${form.host}: the plan" close=${close} width="wider" testid="maintenance-dialog">
    <div class="dialog-body" aria-busy=${String(busy)}>
      <${MaintenancePlan} plan=${plan} overrides=${overrides} onOverride=${override} />
      <${ProblemNote} problem=${problem} />
    </div>
    <footer class="dialog-foot">
      <span class="dialog-foot-note">${blocked ? 'It can start once nothing stands in the way.' : 'Nothing has happened yet.'}</span>
      <button type="button" class="button" onClick=${() => setPlan(null)}>Change</button>
      ${blocked && html`<button type="button" class="button" disabled=${busy} onClick=${() => makePlan(overrides)}>Plan again</button>`}
      <button type="button" class="button button-primary" autofocus disabled=${blocked} aria-busy=${String(busy)}
        data-testid="maintenance-start" onClick=${start}>${busy ? 'One moment…' : 'Start maintenance'}</button>
    </footer>
  <//>`;
}

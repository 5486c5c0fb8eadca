// Moving everything off a host, after showing what would move where.

import { html } from '../lib/ui.js';
import { tryPost } from '../lib/api.js';
import { Dialog } from '../parts/dialog.js';
import { Loading } from '../parts/placeholder.js';
import { MaintenancePlan } from '../parts/plan.js';
import { ProblemNote } from '../parts/problem.js';
import { useAnswer } from './form.js';

/** Closes with true when the operator wants it. */
export function EvacuateDialog({ host, close }) {
  const dry = useAnswer(host.id, (signal) => tryPost(`/v1/hosts/${host.id}/evacuate`, {}, signal));
  return html`<${Dialog} title="Evacuate ${host.name}?" close=${close} width="wider" testid="evacuate">
    <div class="dialog-body">
      <p class="lead">The host is cordoned and its VMs move away. They do not come back by themselves; for planned work, use maintenance.</p>
      ${dry.busy && html`<${Loading} />`}
      <${ProblemNote} problem=${dry.problem} />
      ${dry.answer?.plan && html`<${MaintenancePlan} plan=${dry.answer.plan} />`}
    </div>
    <footer class="dialog-foot">
      <button type="button" class="button" autofocus onClick=${() => close(false)}>Keep as it is</button>
      <button type="button" class="button button-primary" disabled=${!dry.answer} data-testid="evacuate-start"
        onClick=${() => close(true)}>Evacuate</button>
    </footer>
  <//>`;
}

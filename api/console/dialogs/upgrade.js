// Handing a host's running VMs to VMMs of the program that its agent runs now, after showing what would happen.

import { html } from '../lib/ui.js';
import { tryPost } from '../lib/api.js';
import { Dialog } from '../parts/dialog.js';
import { Loading } from '../parts/placeholder.js';
import { ProblemNote } from '../parts/problem.js';
import { useAnswer } from './form.js';

/** Closes with true when the operator wants it. */
export function UpgradeDialog({ host, close }) {
  const dry = useAnswer(host.id, (signal) => tryPost(`/v1/hosts/${host.id}/upgrade`, {}, signal));
  return html`<${Dialog} title="Upgrade the VMs of ${host.name}?" close=${close} testid="upgrade">
    <div class="dialog-body">
      <p class="lead">One VM after the other goes on in a VMM of version ${host.version}, its memory as it is. Each guest stands still for some
        milliseconds; nothing moves to another host.</p>
      ${dry.busy && html`<${Loading} />`}
      <${ProblemNote} problem=${dry.problem} />
      ${dry.answer && html`<ul class="note" data-testid="upgrade-changes">${dry.answer.changes.map((change) => html`<li
        key=${change}>${change}</li>`)}</ul>`}
    </div>
    <footer class="dialog-foot">
      <button type="button" class="button" autofocus onClick=${() => close(false)}>Keep as it is</button>
      <button type="button" class="button button-primary" disabled=${!dry.answer} data-testid="upgrade-start"
        onClick=${() => close(true)}>Upgrade</button>
    </footer>
  <//>`;
}

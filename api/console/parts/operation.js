// Operations: what the controller is doing, step by step.

import { html, useState } from '../lib/ui.js';
import { between, time } from '../lib/format.js';
import { isRunning, operationTitle } from '../lib/pool.js';
import { cancelOperation } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { useNow } from '../lib/clock.js';
import { Progress } from './meter.js';
import { ProblemNote } from './problem.js';
import { State } from './state.js';

/** One line with a bar, for the overview. */
export function OperationLine({ operation }) {
  const step = operation.steps.find((candidate) => candidate.state === 'running');
  return html`<div class="operation-line" data-testid="operation-${operation.id}">
    <a href="#/operations/${operation.id}">${operationTitle(operation)}</a>
    <span class="quiet">${step ? stepText(step) : operation.state}</span>
    <${Progress} share=${operation.progress} label="Progress of ${operationTitle(operation)}" thin />
  </div>`;
}

const stepText = (step) => (step.detail ? `${step.name.replaceAll('_', ' ')}: ${step.detail}` : step.name.replaceAll('_', ' '));

/** A row that opens to show the steps. */
export function OperationRow({ operation, open: openAtFirst }) {
  const now = useNow();
  const [open, setOpen] = useState(Boolean(openAtFirst));
  const title = operationTitle(operation);
  const running = isRunning(operation);
  return html`<tr data-testid="operation-${operation.id}" class="operation-row">
    <td><button type="button" class="disclose" aria-expanded=${String(open)} onClick=${() => setOpen(!open)}>
      <span class="disclose-sign" aria-hidden="true">›</span>${title}</button></td>
    <td><${State} kind="operation" state=${operation.state} /></td>
    <td class="progress-cell">${running ? html`<${Progress} share=${operation.progress} label="Progress of ${title}" thin />` : html`<span
      class="quiet ellipsis" title=${operation.error?.detail}>${operation.error?.detail ?? ''}</span>`}</td>
    <td class="number-left">${time(operation.created_at)}</td>
    <td class="number">${between(operation.created_at, operation.ended_at, now)}</td>
    <td class="quiet">${operation.actor}</td>
    <td class="tools">${running && html`<button type="button" class="button button-small" aria-label="Cancel: ${title}"
      data-testid="operation-cancel" onClick=${() => cancelOperation(operation.id, title)}>Cancel</button>`}</td>
  </tr>
  ${open && html`<tr class="operation-steps"><td colspan="7">
    <${ProblemNote} problem=${operation.error} />
    ${operation.steps.length === 0 ? html`<p class="quiet">No steps yet.</p>` : html`<ol
      class="steps">${operation.steps.map((step) => html`<li key=${step.name}>
      <${State} kind="step" state=${step.state} /><span>${step.name.replaceAll('_', ' ')}</span><span class="quiet">${step.detail}</span>
      </li>`)}</ol>`}
    <p class="quiet">
      <span class="mono">${operation.id}</span>${operation.parent && html`, part of <a
        href=${linkTo('operations', operation.parent)}>a larger operation</a>`}</p>
  </td></tr>`}`;
}

// A problem (RFC 9457) with its way out.

import { html } from '../lib/ui.js';

/** Shows what happened, which fields are at fault and what to do; nothing when there is no problem. */
export function ProblemNote({ problem }) {
  if (!problem) return null;
  return html`<div class="note note-bad" role="alert" data-testid="problem">
    <strong>${problem.title}</strong>
    ${problem.detail && problem.detail !== problem.title && html`<p>${problem.detail}</p>`}
    ${problem.fields?.length > 0 && html`<ul>${problem.fields.map((field) => html`<li>
      <code>${field.field}</code>: ${field.problem}. <em>${field.remedy}</em></li>`)}</ul>`}
    ${problem.remedy && html`<p class="remedy"><span>What to do:</span> ${problem.remedy}</p>`}
  </div>`;
}

/** The problem of a failed request, or a made-up one for a defect of the console itself. */
export function problemIn(error) {
  return error.problem ?? { title: 'The console failed', detail: String(error.message ?? error), remedy: 'reload the page' };
}

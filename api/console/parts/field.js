// A labelled form field with hint and error.

import { classes, html } from '../lib/ui.js';

/** Finds what a problem says of one field; the server names it by its path, such as `spec.vcpus`. */
export function fieldError(problem, path) {
  const found = problem?.fields?.find((field) => field.field === path);
  return found && `${found.problem}; ${found.remedy}`;
}

/** Wraps one input, select or textarea. */
export function Field({ label, hint, error, children, wide }) {
  return html`<label class=${classes('field', wide && 'field-wide', error && 'field-bad')}>
    <span class="field-label">${label}</span>
    ${children}
    ${error ? html`<span class="field-error" role="alert">${error}</span>` : hint && html`<span class="field-hint">${hint}</span>`}
  </label>`;
}

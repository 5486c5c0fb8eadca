// Short messages in the corner: what the operator asked for, how it ended, what went wrong.

import { html, useEffect, useState } from '../lib/ui.js';
import { isRunning, operationTitle } from '../lib/pool.js';
import { store, useStore } from '../lib/store.js';
import { Icon } from './icon.js';
import { problemIn } from './problem.js';

const STAY_MS = 6000;
const MAX_NOTICES = 4;

let notices = [];
let nextKey = 1;
let redraw = () => {};
/** Operations this page has started and whose end it announces. */
const awaited = new Set();

/** Shows a message; problems stay until dismissed. */
export function notify({ tone = 'idle', text, detail, remedy }) {
  const notice = { key: nextKey++, tone, text, detail, remedy };
  notices = [...notices.filter((other) => other.text !== text), notice].slice(-MAX_NOTICES);
  if (tone !== 'bad') setTimeout(() => dismiss(notice.key), STAY_MS);
  redraw();
}

export function notifyProblem(what, error) {
  const problem = problemIn(error);
  notify({ tone: 'bad', text: `${what}: ${problem.title}`, detail: problem.detail, remedy: problem.remedy });
}

/**
 * Sends a request for the operator and says how it went: later, when an operation carries it out, else at once
 * with `outcome`.
 */
export async function perform(what, request, outcome = 'done') {
  try {
    const answer = await request();
    if (answer?.operation?.id) awaited.add(answer.operation.id);
    else notify({ tone: 'ok', text: `${what}: ${outcome}` });
    return answer;
  } catch (error) {
    notifyProblem(what, error);
    return null;
  }
}

function dismiss(key) {
  notices = notices.filter((notice) => notice.key !== key);
  redraw();
}

function announceEnded() {
  for (const id of awaited) {
    const operation = store.operation.get(id);
    if (!operation || isRunning(operation)) continue;
    awaited.delete(id);
    const failed = operation.state === 'failed';
    notify({
      tone: failed ? 'bad' : operation.state === 'succeeded' ? 'ok' : 'idle',
      text: `${operationTitle(operation)}: ${operation.state}`,
      detail: operation.error?.detail,
      remedy: operation.error?.remedy,
    });
  }
}

/** Where messages appear; once per page. */
export function NoticeHost() {
  const [, drawn] = useState(0);
  redraw = () => drawn((count) => count + 1);
  useStore();
  useEffect(announceEnded);
  return html`<div class="notices" role="status" aria-live="polite">
    ${notices.map((notice) => html`<div key=${notice.key} class="notice notice-${notice.tone}" data-testid="notice">
      <${Icon} name=${notice.tone === 'bad' || notice.tone === 'warn' ? 'alert' : 'check'} />
      <div class="notice-text">
        <strong>${notice.text}</strong>
        ${notice.detail && html`<p>${notice.detail}</p>`}
        ${notice.remedy && html`<p class="remedy"><span>What to do:</span> ${notice.remedy}</p>`}
      </div>
      <button type="button" class="button-icon" aria-label="Dismiss" onClick=${() => dismiss(notice.key)}><${Icon} name="close" /></button>
    </div>`)}
  </div>`;
}

// What happened, newest first.

import { classes, html } from '../lib/ui.js';
import { time } from '../lib/format.js';
import { subjectRoute } from '../lib/pool.js';
import { linkTo } from '../lib/router.js';
import { State } from './state.js';

/** A thing an event or operation is about, as a link where there is a page for it. */
function Subject({ subject }) {
  const target = subjectRoute(subject);
  return target ? html`<a href=${linkTo(...target)}>${subject.name}</a>` : html`<span>${subject.name}</span>`;
}

/** One line each, for side panels. */
export function EventLines({ events, empty = 'Nothing has happened yet.' }) {
  if (events.length === 0) return html`<p class="quiet">${empty}</p>`;
  return html`<ol class="event-lines">${events.map((event) => html`<li key="${event.revision}-${event.kind}" class=${classes(`is-${event.severity}`)}>
    <time datetime=${event.time} title=${event.time}>${time(event.time)}</time>
    <span class="event-message">${event.severity !== 'info' && html`<span class="event-mark">${event.severity}</span>`}${event.message}</span>
  </li>`)}</ol>`;
}

/** The full table. */
export function EventTable({ events }) {
  return html`<div class="scroll"><table class="table table-dense" data-testid="events">
    <thead><tr><th scope="col" class="narrow">Time</th><th scope="col" class="narrow">Severity</th>
      <th scope="col" class="narrow">Subject</th><th scope="col">What happened</th><th scope="col" class="narrow">Kind</th>
      <th scope="col" class="narrow">By</th></tr></thead>
    <tbody>${events.map((event) => html`<tr key="${event.revision}-${event.kind}" data-testid="event" data-kind=${event.kind}>
      <td class="number-left"><time datetime=${event.time} title=${event.time}>${time(event.time)}</time></td>
      <td><${State} kind="severity" state=${event.severity} /></td>
      <td><${Subject} subject=${event.subject} /></td>
      <td class="wrap">${event.message}</td>
      <td class="quiet mono">${event.kind}</td>
      <td class="quiet">${event.actor}</td>
    </tr>`)}</tbody>
  </table></div>`;
}

// What happened, live.

import { html, useState } from '../lib/ui.js';
import { EventTable } from '../parts/event-list.js';
import { Empty } from '../parts/placeholder.js';
import { Choice, FilterBox, matches, usePieces } from '../parts/table.js';
import { PageHead } from './page.js';

const FROM = { all: ['info', 'warning', 'error'], warning: ['warning', 'error'], error: ['error'] };

export function EventsView({ pool }) {
  const [query, setQuery] = useState('');
  const [severity, setSeverity] = useState('all');
  const number = (name) => pool.events.filter((event) => FROM[name].includes(event.severity)).length;
  const shown = pool.events.filter((event) => FROM[severity].includes(event.severity)
    && matches(query, event.message, event.kind, event.subject.name, event.actor));
  const [rows, more] = usePieces(shown);
  return html`<${PageHead} title="Events" />
    <div class="toolbar">
      <${FilterBox} label="Filter events" value=${query} onInput=${setQuery} />
      <${Choice} label="Severity" value=${severity} onChange=${setSeverity} options=${[['all', 'All', number('all')],
        ['warning', 'Warnings and errors', number('warning')], ['error', 'Errors', number('error')]]} />
    </div>
    ${shown.length === 0 ? html`<${Empty} title=${pool.events.length ? 'No event matches' : 'Nothing has happened yet'} />`
      : html`<${EventTable} events=${rows} />`}
    ${more}`;
}

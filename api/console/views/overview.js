// The page to keep open: is all well, what needs a look, what is moving, where everything is.

import { html } from '../lib/ui.js';
import { bytes, count, mib, percent } from '../lib/format.js';
import { attention, capacity, census, hosts, isOpen, isRunning, maintenances, movingMigrations, operations } from '../lib/pool.js';
import { addHost } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { HostCard } from '../parts/host-card.js';
import { EventLines } from '../parts/event-list.js';
import { Icon } from '../parts/icon.js';
import { Meter, Progress } from '../parts/meter.js';
import { LiveMigration } from '../parts/migration.js';
import { OperationLine } from '../parts/operation.js';
import { Empty } from '../parts/placeholder.js';
import { State } from '../parts/state.js';
import { More } from '../parts/table.js';
import { PageHead } from './page.js';

const EVENTS_SHOWN = 10;
const MIGRATIONS_SHOWN = 4;
const MANY_HOSTS = 24;

export function OverviewView({ pool }) {
  const wants = attention(pool);
  return html`<${PageHead} title="Overview" />
    <${Health} pool=${pool} wants=${wants} />
    <div class="overview">
      <div class="overview-main">
        <${Work} pool=${pool} />
        <${Board} pool=${pool} />
      </div>
      <div class="overview-side">
        <${Capacity} pool=${pool} />
        <section class="panel" aria-labelledby="recent-title">
          <header class="panel-head"><h2 id="recent-title">Recent events</h2><${More} href="#/events">All events<//></header>
          <${EventLines} events=${pool.events.slice(0, EVENTS_SHOWN)} />
        </section>
      </div>
    </div>`;
}

/** One sentence on the whole pool, and below it what an operator should look at. */
function Health({ pool, wants }) {
  const urgent = wants.filter((item) => item.severity !== 'info').length;
  const worst = wants[0]?.severity ?? 'info';
  const tone = urgent === 0 ? 'ok' : worst === 'error' ? 'bad' : 'warn';
  const needs = urgent === 0 ? 'nothing needs attention' : `${count(urgent, 'thing')} ${urgent === 1 ? 'needs' : 'need'} attention`;
  return html`<section class="health health-${tone}" aria-label="Health of the pool">
    <p class="health-sentence" role="status" data-testid="health"><${Icon} name=${tone === 'ok' ? 'check' : 'alert'} />
      <span>${census(pool)}, ${needs}.</span></p>
    ${wants.length > 0 && html`<ul class="attention" data-testid="attention">${wants.map((item) => html`<li key=${item.key}
      class="attention-${item.severity}">
      <span class="dot" aria-hidden="true"></span>
      <span class="attention-text">
        <a href=${linkTo(item.view, item.id)}>${item.text}</a>${item.detail && html`<span class="quiet">: ${item.detail}</span>`}</span>
      <span class="attention-severity">${item.severity === 'info' ? 'note' : item.severity}</span>
    </li>`)}</ul>`}
  </section>`;
}

/** Maintenances, migrations and other operations under way; absent when all is quiet. */
function Work({ pool }) {
  const open = maintenances(pool).filter(isOpen);
  const moving = movingMigrations(pool);
  const shown = new Set(moving.map((migration) => migration.vm));
  const running = operations(pool).filter((operation) => isRunning(operation)
    && !partOfAnother(pool, operation)
    && !(operation.kind === 'migrate' && shown.has(operation.subject.id))
    && !open.some((maintenance) => maintenance.operation === operation.id));
  const quiet = open.length + moving.length + running.length === 0;
  return html`<section class="panel" aria-labelledby="work-title" data-testid="work">
    <header class="panel-head">
      <h2 id="work-title">Under way</h2>${quiet ? html`<span class="quiet">Nothing is moving.</span>` : html`<${More}
        href="#/operations">All operations<//>`}</header>
    ${!quiet && html`<div class="work">
      ${open.map((maintenance) => html`<${MaintenanceLine} key=${maintenance.id} pool=${pool} maintenance=${maintenance} />`)}
      ${moving.slice(0, MIGRATIONS_SHOWN).map((migration) => html`<${LiveMigration} key=${migration.id} migration=${migration} />`)}
      ${moving.length > MIGRATIONS_SHOWN && html`<p class="quiet">and ${count(moving.length - MIGRATIONS_SHOWN, 'more migration')}</p>`}
      ${running.map((operation) => html`<${OperationLine} key=${operation.id} operation=${operation} />`)}
    </div>`}
  </section>`;
}

function MaintenanceLine({ pool, maintenance }) {
  const operation = pool.operation.get(maintenance.operation);
  return html`<div class="work-maintenance" data-testid="maintenance-${maintenance.host_name}">
    <a href=${linkTo('maintenance', maintenance.id)}>Maintenance of ${maintenance.host_name}</a>
    <${State} kind="maintenance" state=${maintenance.state} />
    <span class="quiet ellipsis">${maintenance.reason}</span>
    ${operation && isRunning(operation) && html`<${Progress} share=${operation.progress}
      label="Progress of the maintenance of ${maintenance.host_name}" thin />`}
  </div>`;
}

/** Whether it is shown already as a step of the operation it belongs to. */
function partOfAnother(pool, operation) {
  const parent = operation.parent && pool.operation.get(operation.parent);
  return Boolean(parent) && isRunning(parent);
}

function Board({ pool }) {
  const all = hosts(pool);
  return html`<section aria-labelledby="board-title">
    <header class="section-head"><h2 id="board-title">Hosts</h2><${More} href="#/hosts">All hosts<//></header>
    ${all.length === 0
      ? html`<${Empty} title="No hosts yet">Add the first one: <button type="button" class="link"
        onClick=${addHost}>create a join token</button> and run the command it shows.<//>`
      : html`<div class="host-grid host-grid-compact">${all.slice(0, MANY_HOSTS).map((host) => html`<${HostCard} key=${host.id}
        pool=${pool} host=${host} compact />`)}</div>`}
    ${all.length > MANY_HOSTS && html`<p class="quiet">and ${count(all.length - MANY_HOSTS, 'more host')}</p>`}
  </section>`;
}

function Capacity({ pool }) {
  const sum = capacity(pool);
  return html`<section class="panel" aria-labelledby="capacity-title">
    <header class="panel-head"><h2 id="capacity-title">Capacity</h2>
      <span class="quiet">${count(sum.cores, 'core')}, ${count(sum.vcpus, 'vCPU')} given out</span></header>
    <div class="meters">
      <${Meter} label="CPU" warnAt=${0.95} badAt=${Infinity} share=${sum.busyCores / sum.cores} text=${sum.cores ? percent((100 * sum.busyCores) / sum.cores) : '–'} />
      <${Meter} label="Memory" title="Memory in use on all hosts" share=${sum.usedMib / sum.memoryMib}
        text="${bytes(sum.usedMib * 2 ** 20)} of ${mib(sum.memoryMib)}" />
      <${Meter} label="Committed" title="Memory promised to VMs, of what the hosts give to guests" share=${sum.committedMib / sum.guestMib}
        warnAt=${0.9} badAt=${1.001} text="${mib(sum.committedMib)} of ${mib(sum.guestMib)}" />
    </div>
  </section>`;
}

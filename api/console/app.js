// The console: frame, navigation and the view in the middle.

import { classes, html, render, useEffect, useErrorBoundary, useLayoutEffect, useRef } from './lib/ui.js';
import { seconds, time } from './lib/format.js';
import { attention, isOpen, isRunning } from './lib/pool.js';
import { go, useRoute } from './lib/router.js';
import { useStore } from './lib/store.js';
import { follow, retryNow } from './lib/sync.js';
import { applyTheme, useTheme } from './lib/theme.js';
import { useNow } from './lib/clock.js';
import { createVm } from './intents.js';
import { HelpDialog } from './dialogs/help.js';
import { TokenPrompt } from './dialogs/token.js';
import { DialogHost, dialogIsOpen, openDialog } from './parts/dialog.js';
import { Icon, Logo } from './parts/icon.js';
import { NoticeHost } from './parts/notices.js';
import { Empty, Loading } from './parts/placeholder.js';
import { DisksView } from './views/disks.js';
import { EventsView } from './views/events.js';
import { HostView } from './views/host.js';
import { HostsView } from './views/hosts.js';
import { ImagesView } from './views/images.js';
import { MaintenanceView } from './views/maintenance.js';
import { MaintenancesView } from './views/maintenances.js';
import { NetworksView, NetworkView } from './views/networks.js';
import { OperationsView } from './views/operations.js';
import { OverviewView } from './views/overview.js';
import { PageHead } from './views/page.js';
import { VmView } from './views/vm.js';
import { VmsView } from './views/vms.js';

const QUIET_MS = 900;

const SECTIONS = [
  { name: 'overview', title: 'Overview', key: 'o', list: OverviewView, count: (pool) => attention(pool)
    .filter((item) => item.severity !== 'info').length, alarm: true },
  { name: 'hosts', title: 'Hosts', key: 'h', list: HostsView, one: HostView, count: (pool) => pool.host.size },
  { name: 'vms', title: 'VMs', key: 'v', list: VmsView, one: VmView, count: (pool) => pool.vm.size },
  { name: 'images', title: 'Images', key: 'i', list: ImagesView, count: (pool) => pool.image.size },
  { name: 'disks', title: 'Disks', key: 'd', list: DisksView, count: (pool) => pool.disk.size },
  { name: 'networks', title: 'Networks', key: 'n', list: NetworksView, one: NetworkView, count: (pool) => pool.network.size },
  { name: 'maintenance', title: 'Maintenance', key: 'm', list: MaintenancesView, one: MaintenanceView,
    count: (pool) => [...pool.maintenance.values()].filter(isOpen).length },
  { name: 'operations', title: 'Operations', key: 'p', list: OperationsView, one: OperationsView,
    count: (pool) => [...pool.operation.values()].filter(isRunning).length },
  { name: 'events', title: 'Events', key: 'e', list: EventsView },
];

function App() {
  const pool = useStore();
  const route = useRoute();
  useShortcuts();
  const lost = pool.connection.state === 'lost';
  return html`
    <a class="skip" href="#main" onClick=${focusMain}>Skip to content</a>
    <${Sidebar} pool=${pool} here=${route.name} />
    <main id="main" data-testid="main" aria-busy=${String(!pool.loaded)}>
      ${lost && html`<${Disconnected} connection=${pool.connection} loaded=${pool.loaded} />`}
      <div class=${classes('page', lost && pool.loaded && 'is-stale')}>
        <${View} key="${route.name}/${route.id}" pool=${pool} route=${route} /></div>
    </main>
    <${NoticeHost} />
    <${DialogHost} />
    <${TokenPrompt} />`;
}

function View({ pool, route }) {
  const [failure] = useErrorBoundary((error) => console.error(error));
  const section = SECTIONS.find(({ name }) => name === route.name);
  useRouteFocus(route);
  if (failure) return html`<${PageHead} title=${section?.title ?? 'Godwit'} />
    <${Empty} title="This view failed">${failure.message}. <a href="">Reload the page</a> to try again.<//>`;
  if (!section) return html`<${PageHead} title="Not found" /><${Empty} title="There is no such page"><a href="#/">Go to the overview</a>
    <//>`;
  if (!pool.loaded) return html`<${PageHead} title=${section.title} /><${Loading} />`;
  const Shown = route.id && section.one ? section.one : section.list;
  return html`<${Shown} pool=${pool} id=${route.id} />`;
}

function Sidebar({ pool, here }) {
  const [theme, nextTheme] = useTheme();
  const signs = { system: 'system', light: 'sun', dark: 'moon' };
  return html`<header class="sidebar">
    <a class="brand" href="#/"><${Logo} /><span>Godwit</span></a>
    <nav aria-label="Sections"><ul>${SECTIONS.map(({ name, title, count, alarm }) => {
      const number = pool.loaded && count ? count(pool) : 0;
      return html`<li key=${name}><a href="#/${name}" aria-current=${here === name ? 'page' : null} data-testid="nav-${name}">
        <${Icon} name=${name} />
        <span class="nav-title">${title}</span>${number > 0 && html`<span class=${classes('count', alarm && 'count-alarm')}>${number}</span>`}</a>
        </li>`;
    })}</ul></nav>
    <div class="sidebar-foot">
      <${Connection} connection=${pool.connection} />
      <button type="button" class="button-icon" data-testid="theme-toggle" aria-label="Theme: ${theme}" title="Theme: ${theme}" onClick=${nextTheme}>
        <${Icon} name=${signs[theme]} /></button>
      <button type="button" class="button-icon" aria-label="Keyboard shortcuts" title="Keyboard shortcuts ( ? )"
        onClick=${() => openDialog(HelpDialog)}>?</button>
    </div>
  </header>`;
}

function Connection({ connection }) {
  const words = { connecting: 'Connecting…', live: 'Live', lost: 'Disconnected' };
  const tone = { connecting: 'idle', live: 'ok', lost: 'bad' }[connection.state];
  return html`<span class="connection" role="status" data-testid="connection" data-state=${connection.state}>
    <span class="dot dot-${tone}" aria-hidden="true"></span><span class="connection-word">${words[connection.state]}</span></span>`;
}

/** Tells that what is shown is old, since when, and when the next attempt is. */
function Disconnected({ connection, loaded }) {
  const now = useNow();
  // A stream that ends and comes back at once is not worth a word.
  if (now - connection.since < QUIET_MS) return null;
  const wait = Math.max(0, Math.ceil((connection.retryAt - now) / 1000));
  return html`<div class="banner" role="alert" data-testid="disconnected">
    <${Icon} name="alert" />
    <span>
      <strong>Connection lost, retrying…</strong> ${loaded ? `What you see is from ${time(connection.since)}.` : connection.problem?.remedy} ${wait > 1
        && html`<span class="quiet">Next attempt in ${seconds(wait).replace('.0', '')}.</span>`}</span>
    <button type="button" class="button button-small" onClick=${retryNow}>Retry now</button>
  </div>`;
}

/** After a change of view the heading has the focus, so that keyboard and screen reader begin there. */
function useRouteFocus(route) {
  const first = useRef(firstView);
  useLayoutEffect(() => {
    firstView = false;
    if (first.current) return;
    scrollTo(0, 0);
    if (!dialogIsOpen()) document.querySelector('main h1')?.focus({ preventScroll: true });
  }, [route.name, route.id]);
}
let firstView = true;

function focusMain(event) {
  event.preventDefault();
  document.querySelector('main h1')?.focus();
}

function useShortcuts() {
  useEffect(() => {
    let prefix = false;
    const onKey = (event) => {
      const typing = event.target.closest('input, textarea, select, .serial, dialog, [contenteditable]');
      if (typing || dialogIsOpen() || event.ctrlKey || event.metaKey || event.altKey) return;
      const section = prefix && SECTIONS.find(({ key }) => key === event.key);
      prefix = event.key === 'g';
      if (section) go(section.name);
      else if (event.key === '/') document.querySelector('[data-filter]')?.focus();
      else if (event.key === 'n') createVm();
      else if (event.key === '?') openDialog(HelpDialog);
      else return;
      event.preventDefault();
    };
    window.addEventListener('keydown', onKey);
    return () => window.removeEventListener('keydown', onKey);
  }, []);
}

applyTheme();
render(html`<${App} />`, document.getElementById('app'));
follow();

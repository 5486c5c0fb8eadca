// All networks; one network with the addresses its VMs have.

import { html } from '../lib/ui.js';
import { count } from '../lib/format.js';
import { find, networks } from '../lib/pool.js';
import { createNetwork, networkIntents } from '../intents.js';
import { linkTo } from '../lib/router.js';
import { Actions } from '../parts/actions.js';
import { Icon } from '../parts/icon.js';
import { Empty } from '../parts/placeholder.js';
import { usePieces } from '../parts/table.js';
import { PageHead } from './page.js';

const NOTHING = html`<span class="quiet">–</span>`;

/** "VXLAN 100". */
export function transportWords(transport) {
  switch (transport.kind) {
    case 'vxlan': return `VXLAN ${transport.vni}`;
    case 'vlan': return `VLAN ${transport.tag} on ${transport.uplink}`;
    case 'bridge': return `bridge ${transport.bridge}`;
    default: return 'on each host by itself';
  }
}

export function NetworksView({ pool }) {
  const all = networks(pool);
  const [rows, more] = usePieces(all);
  return html`<${PageHead} title="Networks" note=${html`<span class="page-count">${all.length}</span>`}>
      <button type="button" class="button button-primary" data-testid="create-network-open" onClick=${createNetwork}>
        <${Icon} name="plus" />Create network</button>
    <//>
    ${all.length === 0
      ? html`<${Empty} title="No networks yet">On a VXLAN or a VLAN a VM keeps its address wherever it moves.<//>`
      : html`<div class="scroll"><table class="table" data-testid="networks">
          <thead><tr><th scope="col">Name</th><th scope="col">Reaches hosts by</th><th scope="col">Subnet</th><th scope="col">Router</th>
            <th scope="col" class="number">MTU</th><th scope="col" class="number">Leases</th><th scope="col" class="number">VMs</th>
            <th scope="col"><span class="hidden">Actions</span></th></tr></thead>
          <tbody>${rows.map((network) => html`<tr key=${network.id} data-testid="network-${network.name}">
            <td><a class="name" href=${linkTo('networks', network.name)}>${network.name}</a></td>
            <td>${transportWords(network.transport)}</td>
            <td class="number-left">${network.subnet?.cidr ?? NOTHING}</td>
            <td class="number-left">${network.subnet?.gateway ?? NOTHING}</td>
            <td class="number">${network.mtu}</td><td class="number">${network.leases.length}</td><td class="number">${network.vms}</td>
            <td class="tools"><${Actions} intents=${networkIntents(network)} name=${network.name} small /></td>
          </tr>`)}</tbody>
        </table></div>`}
    ${more}`;
}

export function NetworkView({ pool, id }) {
  const network = find(pool, 'network', id);
  const crumb = { href: '#/networks', text: 'Networks' };
  const [rows, more] = usePieces(network?.leases ?? []);
  if (!network) return html`<${PageHead} title=${id} crumb=${crumb} /><${Empty} title="There is no network ${id}">It may have been deleted.<//>`;
  const { subnet } = network;
  const facts = [['Reaches hosts by', transportWords(network.transport)], ['MTU', network.mtu], ['Subnet', subnet?.cidr ?? 'none: its own addresses'],
    subnet?.gateway && ['Router', subnet.gateway], subnet?.dns?.length > 0 && ['Name servers', subnet.dns.join(', ')], ['Id', network.id]].filter(Boolean);
  return html`<${PageHead} title=${network.name} crumb=${crumb} note=${html`<span class="quiet">${count(network.vms, 'VM')}</span>`}>
      <${Actions} intents=${networkIntents(network)} name=${network.name} />
    <//>
    <div class="detail">
      <div class="detail-main"><section class="panel"><header class="panel-head"><h2>Leases</h2></header>
        ${rows.length === 0 ? html`<p class="quiet">No VM has an address here.</p>` : html`<table class="table" data-testid="leases">
          <thead><tr><th scope="col">Address</th><th scope="col">VM</th></tr></thead>
          <tbody>${rows.map((lease) => html`<tr key=${lease.address}><td class="number-left">${lease.address}</td>
            <td><a href=${linkTo('vms', lease.vm_name)}>${lease.vm_name}</a></td></tr>`)}</tbody></table>`}${more}</section></div>
      <div class="detail-side"><section class="panel"><header class="panel-head"><h2>Facts</h2></header>
        <dl class="facts">${facts.map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl></section></div>
    </div>`;
}

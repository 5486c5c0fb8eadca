// A VM's serial console: xterm over a WebSocket that comes back by itself.
//
// The server sends the last 64 KiB of output on every connection, so the screen is cleared first and nothing
// appears twice.

import { html, useEffect, useRef, useState } from '../lib/ui.js';
import { words } from '../lib/format.js';
import { token } from '../lib/auth.js';
import { lineInput } from './line-input.js';

const LINKS = { connecting: 'Connecting…', live: 'Connected', lost: 'Connection lost, retrying…' };
const BACKOFF_MS = [300, 700, 1500, 3000, 5000];
const THEME = {
  background: '#10151a', foreground: '#d5dde3', cursor: '#e0a070', cursorAccent: '#10151a', selectionBackground: '#2f4a57',
  black: '#1c242b', brightBlack: '#66757f', green: '#7fb98a', yellow: '#d9b36c', red: '#e08a7d', blue: '#7fb0d0', magenta: '#b79ac8', cyan: '#78bdbd',
};

/** The terminal of `vm`; typing goes to the guest. */
export function Terminal({ vm }) {
  const place = useRef(null);
  const [link, setLink] = useState('connecting');
  const answers = ['running', 'paused', 'migrating', 'starting', 'stopping'].includes(vm.state);
  const again = useRef(() => {});
  useEffect(() => {
    let end = () => {};
    let over = false;
    attach(place.current, vm, setLink).then((attached) => {
      if (over) return attached.end();
      end = attached.end;
      again.current = attached.reconnect;
    });
    return () => {
      over = true;
      end();
    };
  }, [vm.id]);
  // A VM that has just started or moved need not wait for the next attempt.
  useEffect(() => again.current(), [answers, vm.host]);
  const text = answers ? LINKS[link] : `The VM is ${words(vm.state)}; the console attaches when it runs`;
  return html`<div class="serial" data-testid="serial-terminal" data-link=${link}>
    <div class="serial-bar"><span class="dot dot-${link === 'live' && answers ? 'ok' : 'idle'}" aria-hidden="true"></span>
      <span role="status">${text}</span><span class="serial-hint">Tab leaves with Shift+Esc</span></div>
    <div class="serial-screen" ref=${place}></div>
  </div>`;
}

async function attach(element, vm, onLink) {
  // The pilot ends its lines with LF alone and leaves echo and editing to the terminal.
  const plain = vm.spec.boot.kind === 'pilot';
  const [{ Terminal: Xterm }, { FitAddon }] = await Promise.all([import('../vendor/xterm/xterm.mjs'), import('../vendor/xterm/addon-fit.mjs')]);
  const xterm = new Xterm({
    theme: THEME, fontFamily: getComputedStyle(document.documentElement).getPropertyValue('--mono'), fontSize: 13, lineHeight: 1.2,
    scrollback: 5000, cursorBlink: !matchMedia('(prefers-reduced-motion: reduce)').matches, convertEol: plain, screenReaderMode: false,
  });
  const fit = new FitAddon();
  xterm.loadAddon(fit);
  xterm.open(element);
  fit.fit();
  // The Tab key belongs to the guest; Shift+Esc lets the keyboard out again.
  xterm.attachCustomKeyEventHandler((event) => {
    if (event.key !== 'Escape' || !event.shiftKey) return true;
    if (event.type === 'keydown') element.closest('main')?.querySelector('h1')?.focus();
    return false;
  });
  const resized = new ResizeObserver(() => fit.fit());
  resized.observe(element);
  const link = connect(vm.id, xterm, onLink);
  const encoder = new TextEncoder();
  const send = (text) => link.send(encoder.encode(text));
  xterm.onData(plain ? lineInput(xterm, send) : send);
  return {
    reconnect: link.reconnect,
    end() {
      link.end();
      resized.disconnect();
      xterm.dispose();
    },
  };
}

function connect(vmId, xterm, onLink) {
  let socket = null;
  let timer = null;
  let attempt = 0;
  let over = false;
  const open = () => {
    clearTimeout(timer);
    if (over) return;
    onLink(attempt === 0 ? 'connecting' : 'lost');
    const address = new URL(`/v1/vms/${vmId}/serial`, location.href);
    address.protocol = address.protocol.replace('http', 'ws');
    const held = token();
    socket = new WebSocket(address, held ? ['godwit', `godwit.token.${held}`] : ['godwit']);
    socket.binaryType = 'arraybuffer';
    let fresh = true;
    socket.onopen = () => onLink('live');
    socket.onmessage = ({ data }) => {
      if (fresh) xterm.reset();
      fresh = false;
      attempt = 0;
      xterm.write(typeof data === 'string' ? data : new Uint8Array(data));
    };
    socket.onclose = () => {
      socket = null;
      if (over) return;
      onLink('lost');
      timer = setTimeout(open, BACKOFF_MS[Math.min(attempt, BACKOFF_MS.length - 1)]);
      attempt += 1;
    };
  };
  open();
  return {
    send: (data) => socket?.readyState === WebSocket.OPEN && socket.send(data),
    reconnect() {
      attempt = 0;
      if (!socket) open();
    },
    end() {
      over = true;
      clearTimeout(timer);
      socket?.close();
    },
  };
}

// Typing for a guest that neither echoes nor edits its input, as the built-in pilot: both happen here, and the
// guest gets whole lines.

const ENTER = '\r';
const BACKSPACE = '\x7f';
const DROP_LINE = ['\x03', '\x15'];
const MAX_LINE = 200;

/** Takes what is typed into `xterm` and gives `send` one line at a time. */
export function lineInput(xterm, send) {
  let line = '';
  const erase = (count) => xterm.write('\b \b'.repeat(count));
  return (typed) => {
    for (const key of typed.startsWith('\x1b') ? '' : typed.replaceAll('\n', ENTER)) {
      if (key === ENTER) {
        xterm.write('\r\n');
        send(`${line}\n`);
        line = '';
      } else if (key === BACKSPACE && line) {
        erase(1);
        line = line.slice(0, -1);
      } else if (DROP_LINE.includes(key)) {
        erase(line.length);
        line = '';
      } else if (key >= ' ' && key !== BACKSPACE && line.length < MAX_LINE) {
        xterm.write(key);
        line += key;
      }
    }
  };
}

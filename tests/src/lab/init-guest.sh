#!/bin/busybox sh
# Init of a guest: modules, the power button, then the command loop of shell.rs on the console, or a shell for people.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t tmpfs tmpfs /tmp
while read -r module; do insmod "/lib/modules/$module.ko"; done </lib/modules/base.order
acpid -l /tmp/acpid.log
ip link set lo up
if grep -q 'lab\.shell=people' /proc/cmdline; then
    echo 'lab shell ready'
    export PS1='guest# '
    # Leaving it ends init, so the guest restarts.
    exec setsid cttyhack sh
fi
stty raw -echo
# Fills, dirties and verifies memory; it answers in /tmp/agent.out.
mkfifo /tmp/agent.in
/guest-agent <>/tmp/agent.in >>/tmp/agent.out 2>&1 &
agent() { : >/tmp/agent.out; echo "$*" >/tmp/agent.in; until grep -qE '^(ok|error)' /tmp/agent.out; do usleep 20000; done; cat /tmp/agent.out; grep -q '^ok' /tmp/agent.out; }
echo 'lab shell ready'
while read -r id command; do
    echo "<<$id"
    (eval "$command") </dev/null 2>&1
    echo "$id>>$?"
done
poweroff -f

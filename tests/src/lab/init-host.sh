#!/bin/busybox sh
# Init of an emulated host: modules, network, then the command loop of shell.rs.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/data/bin:/bin HOME=/root
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for folder in /dev/shm /tmp /run /state; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
mount -t cgroup2 cgroup /sys/fs/cgroup

setting() { sed -n "s/.*lab\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
for list in base $(setting role); do
    while read -r module; do insmod "/lib/modules/$module.ko"; done <"/lib/modules/$list.order"
done
mount -t ext4 -o ro /dev/vda /data
# What operators have put there on every host.
[ -d /data/srv ] && [ "$(setting role)" = host ] && mount -o bind /data/srv /srv

hostname "$(setting name)"
ip link set lo up
ip addr add "$(setting address)" dev eth0
ip link set eth0 up
# The way in for the harness: QEMU forwards a port of the machine that runs it.
[ -d /sys/class/net/eth1 ] && ip addr add 10.0.2.15/24 dev eth1 && ip link set eth1 up

# The port that QEMU gave this name.
port() { grep -lx "$1" /sys/class/virtio-ports/*/name 2>/dev/null | sed 's,.*ports/\([^/]*\)/name,/dev/\1,'; }
until [ -c "$(port shell)" ] && [ -c "$(port log)" ]; do usleep 10000; done
exec 3<>"$(port shell)" 4>"$(port log)"
# Runs a program in the background; what it says survives the host in its log.
daemon() { setsid "$@" </dev/null >&4 2>&1 3>&- & }
echo 'lab shell ready' >&3
while read -r id command <&3; do
    echo "<<$id" >&3
    (eval "$command") </dev/null >&3 2>&1
    echo "$id>>$?" >&3
done
poweroff -f

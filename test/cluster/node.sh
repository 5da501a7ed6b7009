# The first process of the machine: it makes mounts and a network of its own,
# says that it is up, and takes in orphans until it is ended.
set -euo pipefail
dir=$1

# What is mounted here is seen by the machine's pods, and by nobody outside.
mount --make-rshared /
mount -t tmpfs -o mode=755 run /run
for part in lib log; do
	mkdir "$dir/var-$part"
	mount --bind "$dir/var-$part" "/var/$part"
done

# The cgroups begin where the machine does. The fields after the dash are type,
# source and options.
cp /proc/self/mountinfo /run/mounts # as it is before the first change
while read -r _ _ _ _ at rest; do
	read -r type _ options <<<"${rest#* - }"
	options=${options#rw,}
	case $at:$type in
	/sys/fs/cgroup/*:cgroup) umount "$at" && mount -t cgroup -o "${options/#name=/none,name=}" cgroup "$at" ;;
	/sys/fs/cgroup*:cgroup2) umount "$at" && mount -t cgroup2 cgroup2 "$at" ;;
	esac
done </run/mounts

hostname node1
ip link set lo up
ip link add node0 type veth peer name node0-peer
ip link set node0 up
ip link set node0-peer up
ip address add 172.31.253.1/24 dev node0
ip route add default via 172.31.253.2
echo 1 >/proc/sys/net/ipv4/ip_forward

touch "$dir/up"
while :; do
	sleep 3600 &
	wait $! || true
done

#!/bin/sh
# The first process of the guest of guest_soak.py: looks at the files there are, then writes more until it is killed.
mount -t proc none /proc
mount -t devtmpfs none /dev
for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk; do
    insmod /modules/$module.ko
done
mount -t ext4 -o discard /dev/vda /mnt || { echo "NO MOUNT"; poweroff -f; }
cd /mnt || poweroff -f
for sums in f*.md5; do
    [ -f "$sums" ] && md5sum -c "$sums" >/dev/null 2>&1 && echo "HAS ${sums%.md5} $(cut -d' ' -f1 "$sums")"
done
echo "LOOKED"
number=$(cat count 2>/dev/null || echo 0)
while true; do
    number=$((number + 1))
    name=f$number
    dd if=/dev/urandom of=$name bs=4096 count=$((RANDOM % 64 + 1)) 2>/dev/null
    md5sum $name >$name.md5
    echo $number >count
    sync
    echo "SYNCED $name $(cut -d' ' -f1 $name.md5)"
    old=f$((number - 40))
    [ -f $old ] && echo "REMOVES $old" && rm -f $old.md5 $old
    [ $((number % 37)) = 0 ] && dd if=/dev/zero of=zeroes bs=1M count=40 2>/dev/null
done

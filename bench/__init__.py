"""Speed, side by side: qsd and a reference ``qemu-storage-daemon``, in one run, on one machine.

Rules of measuring, kept by every module here:

- The two daemons take turns (A B A B ...), so that what else the machine does hits both; a figure is a median.
- One daemon lives at a time, started for one repetition, on the same image; only the page cache carries over.
- What a repetition wrote is on disk before the next begins, so that nobody pays for another's writeback.
- Memory that writing to a fresh image takes has been used a moment before, for both alike.
- The reference gets its best aio mode, found for each workload in a short calibration of the same run.
- Waiting is for facts (a socket that answers, a process that ended), each with a deadline.
"""

// glibc's flag that no second thread was ever started, new in 2.32: libstdc++ then counts references without atomics.
// 0 says that there may be threads, which is always right.
char __libc_single_threaded = 0;

/* A fault layer below the relay: while the control file says so, syncs or writes
 * of the outbox's database fail as on a broken or a full disk, or syncs do not end. Loaded by
 * LD_PRELOAD; FAULT_CONTROL names the control file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static ssize_t (*real_read)(int, void *, size_t);

/* The errno with which an operation of this kind on this file fails; 0 if it does not. */
static int fault(int fd, const char *kind) {
  const char *control = getenv("FAULT_CONTROL");
  char link[64], target[4096], word[16] = {0};
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, target, sizeof target - 1);
  if (control == NULL || length < 0) return 0;
  target[length] = 0;
  if (strstr(target, "relay.db") == NULL && strstr(target, "relay.journal") == NULL) return 0;
  int file = open(control, O_RDONLY);
  if (file < 0) return 0;
  if (real_read == NULL) real_read = dlsym(RTLD_NEXT, "read");
  ssize_t got = real_read(file, word, sizeof word - 1);
  close(file);
  if (got <= 0 || strncmp(word, kind, strlen(kind)) != 0) return 0;
  if (strcmp(kind, "sync") == 0) return EIO;
  return strcmp(kind, "full") == 0 ? ENOSPC : EROFS;
}

#define FAIL_IF(kind)                \
  do {                               \
    int error = fault(fd, kind);     \
    if (error != 0) {                \
      errno = error;                 \
      return -1;                     \
    }                                \
  } while (0)

/* A disk that does not answer for now. */
static void stall(int fd) {
  while (fault(fd, "stall") != 0) usleep(1000);
}

int fsync(int fd) {
  static int (*real)(int);
  stall(fd);
  FAIL_IF("sync");
  if (real == NULL) real = dlsym(RTLD_NEXT, "fsync");
  return real(fd);
}

int fdatasync(int fd) {
  static int (*real)(int);
  stall(fd);
  FAIL_IF("sync");
  if (real == NULL) real = dlsym(RTLD_NEXT, "fdatasync");
  return real(fd);
}

ssize_t write(int fd, const void *bytes, size_t count) {
  static ssize_t (*real)(int, const void *, size_t);
  FAIL_IF("full");
  FAIL_IF("readonly");
  if (real == NULL) real = dlsym(RTLD_NEXT, "write");
  return real(fd, bytes, count);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset) {
  static ssize_t (*real)(int, const void *, size_t, off_t);
  FAIL_IF("full");
  FAIL_IF("readonly");
  if (real == NULL) real = dlsym(RTLD_NEXT, "pwrite");
  return real(fd, bytes, count, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset) {
  static ssize_t (*real)(int, const void *, size_t, off64_t);
  FAIL_IF("full");
  FAIL_IF("readonly");
  if (real == NULL) real = dlsym(RTLD_NEXT, "pwrite64");
  return real(fd, bytes, count, offset);
}

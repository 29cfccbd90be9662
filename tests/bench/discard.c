/* Throw away what comes from a socket, until there were `most` bytes (below 0: until its end); how many there were.
 * TCP: the kernel throws them away by itself (tcp(7), MSG_TRUNC). Another socket's have to be copied. */
#include <stddef.h>
#include <sys/socket.h>

#define PIECE (1 << 20)

static __thread char somewhere[PIECE];

long long discard(int fd, long long most, int tcp)
{
    long long got = 0;

    while (most < 0 || got < most) {
        size_t wanted = most < 0 || most - got > PIECE ? PIECE : (size_t)(most - got);
        ssize_t number = recv(fd, tcp ? NULL : somewhere, wanted, tcp ? MSG_TRUNC : 0);
        if (number <= 0)
            break;
        got += number;
    }
    return got;
}

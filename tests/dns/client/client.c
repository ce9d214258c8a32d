// client NAME: the addresses of a name as the C library's resolver finds them, sorted, one a line; 1 and its word for the error
// otherwise. Built with glibc and with musl.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int compare(const void *a, const void *b) { return strcmp(a, b); }

int main(int argc, char **argv) {
	struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found, *a;
	static char texts[4096][INET_ADDRSTRLEN];
	size_t n = 0;
	int error = argc == 2 ? getaddrinfo(argv[1], NULL, &hints, &found) : EAI_NONAME;
	if (error) {
		printf("%s\n", gai_strerror(error));
		return 1;
	}
	for (a = found; a && n < 4096; a = a->ai_next)
		inet_ntop(AF_INET, &((struct sockaddr_in *)a->ai_addr)->sin_addr, texts[n++], INET_ADDRSTRLEN);
	qsort(texts, n, sizeof texts[0], compare);
	for (size_t i = 0; i < n; i++) puts(texts[i]);
	return 0;
}

// client NAME: the addresses of a name as Go's own resolver finds them, sorted, one a line; 1 and the error otherwise.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"sort"
)

func main() {
	resolver := net.Resolver{PreferGo: true}
	found, err := resolver.LookupNetIP(context.Background(), "ip4", os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	texts := []string{}
	for _, a := range found {
		texts = append(texts, a.Unmap().String())
	}
	sort.Strings(texts)
	for _, text := range texts {
		fmt.Println(text)
	}
}

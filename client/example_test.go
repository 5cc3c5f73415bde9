package client_test

import (
	"context"
	"log"
	"os"

	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/state"
)

// A container from its bundle to its exit code.
func Example() {
	ctx := context.Background()
	f, err := os.Open("/bundle/config.json")
	if err != nil {
		log.Print(err)
		return
	}
	defer f.Close()
	spec, err := ocispec.Load(f)
	if err != nil {
		log.Print(err)
		return
	}
	req, err := ocispec.Translate(spec, ocispec.Options{ID: "one", Bundle: "/bundle"})
	if err != nil {
		log.Print(err) // names the field of config.json
		return
	}
	c := client.New(client.Options{Store: state.Open("/run/runv"), Program: "/usr/local/bin/runv"})
	p, err := c.Create(ctx, client.CreateOptions{
		Request: req,
		Stdio:   client.Stdio{Out: os.Stdout, Err: os.Stderr},
		Network: client.NetworkNew,
	})
	if err != nil {
		log.Print(err) // nothing of the container is left
		return
	}
	if err := c.Start(ctx, "one"); err != nil {
		log.Print(err)
	}
	exit, err := p.Wait()
	log.Print(exit.Status(), err)
	if err := c.Delete(ctx, "one", true); err != nil {
		log.Print(err)
	}
}

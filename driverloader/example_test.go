package driverloader_test

import (
	"context"
	"fmt"
	"log"

	"github.com/hyperhq/runv/driverloader"
)

func ExampleProbe() {
	// The empty name asks for the best driver that works on this host.
	driver, err := driverloader.Probe(context.Background(), "", driverloader.Options{})
	if err != nil {
		log.Print(err) // says why each driver cannot run, and what to install
		return
	}
	fmt.Printf("using %s, QEMU %s\n", driver.Name(), driver.Version())
}

package factory_test

import (
	"context"
	"fmt"

	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
)

// Whoever wants a VM asks a factory; this one boots it.
func ExampleDirect() {
	f := factory.Direct(&hvtest.Driver{}) // a real program: driverloader.Probe
	defer f.Close()
	_, err := f.GetVM(context.Background(), hypervisor.Config{Name: "pod1", VCPUs: 1, MemoryMiB: 16, Kernel: "/boot/vmlinuz", Initrd: "/boot/initrd.img"})
	fmt.Println(err)
	// Output: vm config: memory is 16 MiB, want 64 or more
}

// With a template the VM exists already and is cloned. Where it does not fit,
// the policy decides.
func ExampleFromTemplate() {
	f, err := factory.FromTemplate(&hvtest.Driver{}, "/nonexistent/template", factory.Required)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	_, err = f.GetVM(context.Background(), hypervisor.Config{Name: "pod1", VCPUs: 1, MemoryMiB: 128, Kernel: "/boot/vmlinuz", Initrd: "/boot/initrd.img"})
	fmt.Println(err)
	// Output: open template /nonexistent/template: template does not exist
}

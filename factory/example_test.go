package factory_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
	"github.com/hyperhq/runv/template"
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

// A factory of two sizes: two small VMs are always ready, a large one is cloned
// from a template, which is made when it is needed first.
func ExampleNewFromPolicy() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	base := hypervisor.Config{Name: "vm", Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd.img")}
	for path, text := range map[string]string{base.Kernel: "a kernel", base.Initrd: "070701"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			fmt.Println(err)
			return
		}
	}
	// Each VM has a directory of its own, whose files its guest sees.
	prepare := func(n int, c hypervisor.Config) (hypervisor.Config, func(), error) {
		c.Name = fmt.Sprintf("vm%d", n)
		share := filepath.Join(dir, c.Name)
		c.Shares = []hypervisor.Share{{Tag: "share", Path: share}}
		return c, func() { os.RemoveAll(share) }, os.Mkdir(share, 0o700)
	}
	f, err := factory.NewFromPolicy(&hvtest.Driver{}, factory.Options{
		Policy:    factory.Required,
		Templates: filepath.Join(dir, "templates"),
		Make:      &template.Options{}, // a real program: Settle and StartHolder
		Base:      base,
		Prepare:   prepare,
	}, `{"cache":2,"cpu":1,"memory":128},{"template":true,"cpu":4,"memory":1024}`)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()

	ask := base
	ask.VCPUs, ask.MemoryMiB = 2, 512
	vm, err := f.GetVM(context.Background(), ask)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { vm.Kill(); <-vm.Done() }()
	got, _ := factory.ConfigOf(vm)
	fmt.Println(got.VCPUs, "CPUs,", got.MemoryMiB, "MiB,", len(got.Shares), "share")

	ask.MemoryMiB = 2048
	_, err = f.GetVM(context.Background(), ask)
	fmt.Println(err)

	_, err = factory.NewFromPolicy(&hvtest.Driver{}, factory.Options{}, `{"cpu":1,"memory":"128"}`)
	fmt.Println(err)
	// Output:
	// 4 CPUs, 1024 MiB, 1 share
	// factory policy: all entries are too small: 2 vcpus and 2048 MiB of memory are asked for
	// factory policy: memory wants a whole number (character 19, near "\"128\"}")
}

// GetVM takes a VM that is ready, if there is one. What it was made of tells
// ConfigOf.
func ExampleFactory_GetVM() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	base := hypervisor.Config{Name: "pod", VCPUs: 1, MemoryMiB: 128, Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd.img")}
	for path, text := range map[string]string{base.Kernel: "a kernel", base.Initrd: "070701"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			fmt.Println(err)
			return
		}
	}
	f, err := factory.NewFromConfigs(&hvtest.Driver{}, factory.Options{
		Base: base,
		Prepare: func(n int, c hypervisor.Config) (hypervisor.Config, func(), error) {
			c.ConsoleLog = filepath.Join(dir, fmt.Sprintf("console%d.log", n))
			return c, func() { os.Remove(c.ConsoleLog) }, nil
		},
	}, []factory.Config{{Cache: 1, CPU: 1, Memory: 128}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()

	vm, err := f.GetVM(context.Background(), base) // ready, or booted now
	if err != nil {
		fmt.Println(err)
		return
	}
	got, _ := factory.ConfigOf(vm)
	fmt.Println(filepath.Ext(got.ConsoleLog))
	vm.Kill()
	<-vm.Done()
	s := factory.StatsOf(f)[0]
	fmt.Println(s.Claimed+s.Misses, "request")
	// Output:
	// .log
	// 1 request
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// refilling is the run of a container that takes a VM out of a pool while that
// makes another one ready. It is an operation that only pools have.
const refilling = "run while refilling"

// stock is what a pool says of itself.
type stock struct{ Size, Ready, Starting int }

func (s stock) full() bool { return s.Ready > 0 && s.Ready >= s.Size }

// refills tells whether one can be had while another one is being made.
func (s stock) refills() bool { return s.Ready > 0 && s.Starting > 0 }

// awaitStock waits for a pool to be in a state.
func (b *bench) awaitStock(ctx context.Context, r *contender, ok func(stock) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, commandLimit, errors.New("the pool is not filled"))
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		text, err := b.children.output(ctx, r.in, r.command("manage", "factory", "status", "--format", "json")...)
		if err != nil {
			return err
		}
		var s stock
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			return fmt.Errorf("manage factory status: %w", err)
		}
		if ok(s) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// stocked waits until a pool is full and so does nothing, which is not part of any
// time.
func (b *bench) stocked(ctx context.Context, r *contender) error {
	if !r.pool {
		return nil
	}
	return b.awaitStock(ctx, r, stock.full)
}

// refill measures a run beside a refill, after one that has taken a VM.
func (b *bench) refill(ctx context.Context, r *contender) error {
	if !r.pool {
		return nil
	}
	if err := b.awaitStock(ctx, r, stock.refills); err != nil {
		return err
	}
	return b.once(ctx, r, refilling)
}

// claims is the table of both.
func (r *result) claims(names []string) (table, bool) {
	t := table{
		title: "Claims", note: "`run` from a pool that does nothing else, and from one that makes a VM ready meanwhile: median and quartiles in milliseconds.",
		rows: [][]string{{"", "at rest", "while refilling", "ratio"}},
	}
	for _, name := range names {
		rest, busy := r.of(name, "run"), r.of(name, refilling)
		if busy.N == 0 {
			continue
		}
		cell := func(s summary) string {
			return fmt.Sprintf("%s (%s to %s)", number(s.Median), number(s.P25), number(s.P75))
		}
		t.rows = append(t.rows, []string{name, cell(rest), cell(busy), number(ratio(busy.Median, rest.Median))})
	}
	return t, len(t.rows) > 1
}
